"""Measure which ONNX Runtime runs our graphs: the tables of engines/vp_engines/backends/ort_versions.py.

    python benchmarks/onnxruntime_versions.py            # measures, prints the tables, compares
    python benchmarks/onnxruntime_versions.py --write    # and updates the file

Every version is installed by pip into a folder of its own and run in a process of its own. Measured on the CPU: an
empty graph of each IR version and opset; each operator of our graphs by itself, in every combination of types that
occurs; and whole graphs (every method and the dense model, with torch operations and with the vp operators, fp32 and
fp16, opset 23 and 18), whose logits are compared with torch's.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TABLES = ROOT / "engines/vp_engines/backends/ort_versions.py"
# The first release of each series available for Python 3.11, and the newest of all.
VERSIONS = (
    *("1.17.1", "1.18.0", "1.19.0", "1.20.0", "1.21.0", "1.22.0", "1.23.0"),
    *("1.24.1", "1.25.0", "1.26.0", "1.28.0", "1.30.0", "1.32.0"),
)
NUMPY_1 = ("1.17.", "1.18.")  # need numpy 1
IRS, OPSETS = range(8, 14), range(18, 26)
OTHERS = (("LpNormalization", 22),)  # used by earlier graphs, now avoided
BATCH = 3
TOLERANCE = {"fp32": 1e-3, "fp16": 0.3}  # of the logits of a random model, whose spread is about 10; ties may flip

# Run with each version: takes cases, returns {name: error or None}.
WORKER = """
import json, pickle, sys
import numpy as np
import onnxruntime as ort
cases = pickle.load(open(sys.argv[1], "rb"))
ort.set_default_logger_severity(4)
found = {}
for name, (graph, images, logits, tolerance) in cases.items():
    try:
        session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
        why = None
        if images is not None:
            error = float(np.abs(session.run(None, {"images": images})[0] - logits).max())
            why = None if error <= tolerance else f"the logits differ by {error:.3g}"
    except Exception as error:
        why = str(error).splitlines()[0]
    found[name] = why
json.dump(found, sys.stdout)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", nargs="+", default=list(VERSIONS), metavar="X.Y.Z", help="oldest first")
    parser.add_argument("--work", type=Path, default=ROOT / "build/onnxruntime", help="where they are installed")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {TABLES.relative_to(ROOT)}")
    parser.add_argument("--same-graphs", action="store_true", help="those of the run before: lowering takes minutes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    args.work.mkdir(parents=True, exist_ok=True)
    kept = args.work / "graphs.pickle"
    graphs = pickle.loads(kept.read_bytes()) if args.same_graphs else whole_graphs()
    kept.write_bytes(pickle.dumps(graphs))
    singles = {key: graph for path, *_ in graphs.values() for key, graph in single_nodes(path).items()}
    for name, since in OTHERS:
        singles[name, since, ("FLOAT",)] = one_node(8, since, name)
    empty = {("ir", ir): one_node(ir, 18) for ir in IRS} | {("opset", n): one_node(8, n) for n in OPSETS}
    cases: dict[Any, tuple[Any, ...]] = {key: (graph, None, None, 0.0) for key, graph in (empty | singles).items()}
    cases |= {("graph", name): case for name, case in graphs.items()}
    file = args.work / "cases.pickle"
    file.write_bytes(pickle.dumps({repr(key): case for key, case in cases.items()}))
    answers = {version: ask(install(version, args.work), file) for version in args.versions}

    tables: dict[str, dict[Any, str]] = {"IR_VERSIONS": {}, "OPSETS": {}, "OPERATORS": {}}
    for key in empty:
        tables["IR_VERSIONS" if key[0] == "ir" else "OPSETS"][key[1]] = least([key], answers)
    for operator in sorted({key[:2] for key in singles}):
        tables["OPERATORS"][operator] = least([key for key in singles if key[:2] == operator], answers)
    text = {name: written(name, table) for name, table in tables.items()}
    print("\n".join(text.values()))
    old = current()
    if args.write:
        TABLES.write_text(replaced(TABLES.read_text(), text))
    wrong = compare(graphs, answers, tables)
    if not args.write and any(old[name] != table for name, table in tables.items()):
        wrong.append(f"{TABLES.relative_to(ROOT)} has other tables: --write puts these into it")
    print("\n".join(wrong) or "every whole graph runs from the version on that the tables name", file=sys.stderr)
    return 1 if wrong else 0


def install(version: str, work: Path) -> Path:
    """Folder with one version, installed if missing."""
    folder = work / version
    if not (folder / "onnxruntime").is_dir():
        numpy = ["numpy<2"] if version.startswith(NUMPY_1) else []
        options = ["-q", "--disable-pip-version-check", "--no-deps", "--target", str(folder)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, f"onnxruntime=={version}", *numpy], check=True
        )
    return folder


def ask(folder: Path, cases: Path) -> dict[str, str | None]:
    """Result of every case with one version."""
    env = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(cases)], env=env, check=True, stdout=subprocess.PIPE, text=True
    )
    print(f"{folder.name} is measured", file=sys.stderr)
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


def least(keys: Iterable[Any], answers: Mapping[str, Mapping[str, str | None]]) -> str:
    """The oldest version from which on all cases run."""
    found = "none"
    for version in reversed(list(answers)):
        if any(answers[version][repr(key)] is not None for key in keys):
            break
        found = version
    return found


def whole_graphs() -> dict[str, tuple[bytes, Any, Any, float]]:
    """name -> (ONNX file, images, torch's logits, tolerance)."""
    import tempfile

    import timm
    import torch

    from vp_engines.backends import get_backend
    from vp_exporter.exporting import _lower
    from vp_exporter.methods import METHODS, MethodRequest, build_plan
    from vp_exporter.model.describe import describe
    from vp_exporter.rewrite.reduced_vit import ReducedViT

    name = "vit_tiny_patch16_224"
    torch.manual_seed(0)
    vit = timm.create_model(name, img_size=64, patch_size=8, embed_dim=64, num_heads=2, num_classes=7, depth=2).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.08))
    description, images = describe(vit, name), torch.randn(BATCH, 3, 64, 64)
    asked: dict[str, MethodRequest | None] = {"dense": None}
    for method in METHODS:
        if method not in ("random", "center"):  # static plans are alike
            takes = METHODS[method].options
            blocks = (0, 1) if "blocks" in takes else None
            asked[method] = MethodRequest(method, target_macs=0.7, blocks=blocks, tau=1e-3 if "tau" in takes else None)
    for method, args in (
        ("evit", {"fuse": False}), ("topk", {"score": "ats"}), ("bat", {"weights": "size"}), ("bat", {"pairs": 0}),
        ("gtp", {"score": "graph", "graph": "semantic"}), ("gtp", {"graph": "spatial"}),
    ):  # fmt: skip
        spelled = " ".join(f"{key}={value}" for key, value in args.items())
        asked[f"{method} {spelled}"] = MethodRequest(method, target_macs=0.7, blocks=(0, 1), args=args)
    backend, made = get_backend("ort"), {}
    with tempfile.TemporaryDirectory() as folder:
        for what, request in asked.items():
            model = ReducedViT(vit, description, None if request is None else build_plan(request, description))
            with torch.no_grad():
                logits = model(images).numpy()
            forms = [("portable", "fp32", 23)]
            if request is None or not request.args:
                forms += [("vp", "fp32", 23), ("portable", "fp32", 18), ("portable", "fp16", 23)]
            if what in ("tome", "evit", "bat"):
                forms += [("vp", "fp32", 18), ("vp", "fp16", 23)]
            for kernels, precision, opset in forms:
                path = Path(folder) / "model.onnx"
                _lower(backend, model, precision, path, kernels, opset=opset)  # type: ignore[arg-type]
                case = (path.read_bytes(), images.numpy(), logits, TOLERANCE[precision])
                made[f"{what}, {kernels}, {precision}, opset {opset}"] = case
            print(f"{what} is lowered", file=sys.stderr)
    return made


def single_nodes(content: bytes) -> dict[tuple[Any, ...], bytes]:
    """(operator, opset of its form, types of its inputs) -> a model with that one node."""
    import onnx
    from onnx import TensorProto, helper

    from vp_kernels.onnx import inline

    model = inline(onnx.load_from_string(content))
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    graph = model.graph
    values = {value.name: value for value in (*graph.input, *graph.output, *graph.value_info)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    found: dict[tuple[Any, ...], bytes] = {}
    for node in graph.node:
        name, since = f"{node.domain}.{node.op_type}", 1
        if node.domain == "":
            name = node.op_type
            since = onnx.defs.get_schema(name, max_inclusive_version=opset).since_version
        inputs = [name for name in dict.fromkeys(node.input) if name]
        types = [weights[n].data_type if n in weights else type_of(values.get(n), constants.get(n)) for n in node.input]
        outputs = [values.get(name) or helper.make_empty_tensor_value_info(name) for name in node.output if name]
        key = (name, since, tuple(TensorProto.DataType.Name(t) for t in types))
        if key in found:
            continue
        body = [*(constants[n] for n in inputs if n in constants), node]
        fed = [values[name] for name in inputs if name not in weights and name not in constants]
        single = helper.make_graph(body, "one", fed, outputs, [weights[name] for name in inputs if name in weights])
        # In the oldest opset with this form: the opset itself is measured separately.
        imports = [helper.make_opsetid("", max(since, OPSETS[0]))] + (
            [helper.make_opsetid(node.domain, 1)] if node.domain else []
        )
        one = helper.make_model(single, opset_imports=imports, ir_version=8)
        found[key] = one.SerializeToString()
    return found


def type_of(value: Any, constant: Any) -> int:
    """Element type of a value; 0 for an omitted input."""
    if constant is not None:
        attribute = constant.attribute[0]
        floats = attribute.name in ("value_float", "value_floats")
        return int(attribute.t.data_type) if attribute.name == "value" else 1 if floats else 7
    return 0 if value is None else int(value.type.tensor_type.elem_type)


def one_node(ir: int, opset: int, op_type: str = "Relu") -> bytes:
    """A model of one operator."""
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy")
    graph = helper.make_graph([helper.make_node(op_type, ["x"], ["y"])], "empty", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    content: bytes = model.SerializeToString()
    return content


def compare(graphs: Mapping[str, Any], answers: Mapping[str, Any], tables: Mapping[str, Any]) -> list[str]:
    """Whole graphs that do not run from the version that the tables give."""
    import onnx

    from vp_engines.backends import ort_versions
    from vp_engines.backends.base import version_tuple

    for name, table in tables.items():
        setattr(ort_versions, name, table)
    wrong = []
    for name, (content, *_) in graphs.items():
        named = ort_versions.least_version(onnx, onnx.load_from_string(content), max(answers, key=version_tuple))
        measured = least([("graph", name)], answers)
        if measured != named:
            before = [v for v in answers if version_tuple(v) < version_tuple(measured)] or [""]
            why = answers.get(before[-1], {}).get(repr(("graph", name)))
            wrong.append(f"{name}: the tables say {named}, it runs from {measured} on ({before[-1]}: {why})")
        else:
            print(f"{name}: runs from {named} on", file=sys.stderr)
    return wrong


def current() -> dict[str, dict[Any, str]]:
    """The tables in the file."""
    from vp_engines.backends import ort_versions

    return {name: dict(getattr(ort_versions, name)) for name in ("IR_VERSIONS", "OPSETS", "OPERATORS")}


def written(name: str, table: Mapping[Any, str]) -> str:
    """A table as Python source."""
    kind = "dict[tuple[str, int], str]" if name == "OPERATORS" else "dict[int, str]"
    rows = [
        f"    {json.dumps(key) if isinstance(key, int) else spelled(key)}: {json.dumps(table[key])},\n" for key in table
    ]
    return f"{name}: {kind} = {{\n{''.join(rows)}}}\n"


def spelled(operator: tuple[str, int]) -> str:
    return f'("{operator[0]}", {operator[1]})'


def replaced(source: str, text: Mapping[str, str]) -> str:
    """The file with its tables replaced."""
    import re

    for name, table in text.items():
        source, count = re.subn(rf"^{name}: .*?\}}\n", table.replace("\\", r"\\"), source, flags=re.M | re.S)
        if count != 1:
            raise SystemExit(f"{TABLES} has no table {name}")
    return source


if __name__ == "__main__":
    sys.exit(main())
