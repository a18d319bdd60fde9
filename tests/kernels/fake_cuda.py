"""Inductor's output for an absent GPU: torch is made to believe in an H200, tensors are fake, nothing is run.

This lets a machine without a GPU check what a GPU machine will compile: that Inductor takes the kernels unchanged,
mutates only their outputs, and inserts no copies before them. Run in a process of its own, with TRITON_INTERPRET unset:
the patches below are not undone.
"""

from __future__ import annotations

import contextlib
import logging
import re
import types
from typing import Any

import torch
from torch import nn

DEVICE = "cuda:0"
H200 = types.SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=139 << 30,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    L2_cache_size=60 << 20,
    gcnArchName="",
    is_integrated=0,
)


class _Driver:
    """The parts of a driver that Triton needs to compile."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_interface(self) -> Any:
        return torch.cuda

    def is_active(self) -> bool:
        return True


class _Written(BaseException):
    """Raised once Inductor has generated its code, before compiling and loading it."""


def pretend() -> None:
    """Make torch believe in one H200, for the rest of this process."""
    import torch._dynamo.device_interface as interface
    import torch._inductor.fx_passes.joint_graph as joint
    import torch._inductor.fx_passes.post_grad as post
    import torch._subclasses.fake_tensor as fake
    import triton

    triton.runtime.driver.set_active(_Driver())
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.get_device_properties = lambda device=None: H200
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda._lazy_init = lambda: None
    cuda.get_rng_state = lambda *_: torch.zeros(16, dtype=torch.uint8)
    cuda.set_rng_state = lambda *_: None
    cuda._exchange_device = cuda._maybe_exchange_device = lambda device: 0
    cuda.is_current_stream_capturing = lambda: False
    fake.init_gpu_context = lambda device: None  # type: ignore[assignment]
    of_cuda: Any = interface.CudaInterface
    of_cuda.is_available = staticmethod(lambda: True)
    of_cuda.get_device_properties = staticmethod(lambda device=None: H200)
    of_cuda.get_compute_capability = staticmethod(lambda device=None: 90)
    of_cuda.Worker.get_device_properties = staticmethod(lambda device=None: H200)
    of_cuda.Worker.current_device = staticmethod(lambda: 0)
    # These trace torch's own attention patterns on the device.
    joint.lazy_init = post.lazy_init = lambda *_: None  # type: ignore[assignment]
    logging.getLogger("torch").setLevel(logging.ERROR)


def inductor_code(module: nn.Module, images: torch.Tensor) -> str:
    """Python wrapper that Inductor generates for a module on the GPU, with its Triton kernels, for any batch size.

    Args:
        module, images: On the CPU, where the program is traced, with operators intact; then it is moved to the GPU.
    """
    import torch._inductor.config as config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.graph import GraphLowering
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    batch = ({0: torch.export.Dim("batch", min=1, max=1024)},)
    with torch.no_grad():
        program = torch.export.export(module, (images,), dynamic_shapes=batch, strict=False).module(check_guards=False)
    written: list[str] = []
    original = GraphLowering.codegen

    def codegen(graph: Any) -> Any:
        code = original(graph)[0]
        written.append(getattr(code, "value", code))
        raise _Written

    def on_gpu(value: torch.Tensor) -> torch.Tensor:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)

    GraphLowering.codegen = codegen  # type: ignore[method-assign]
    try:
        with (
            FakeTensorMode(shape_env=ShapeEnv()) as mode,
            torch.no_grad(),
            config.patch(force_disable_caches=True, joint_graph_constant_folding=False),
        ):
            for part in program.modules():
                for table in (part._parameters, part._buffers, vars(part)):
                    for name, value in table.items():
                        if isinstance(value, nn.Parameter):
                            table[name] = nn.Parameter(on_gpu(value), requires_grad=False)
                        elif isinstance(value, torch.Tensor):
                            table[name] = on_gpu(value)
            for node in program.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": torch.device(DEVICE)}
            program.recompile()
            sizes = [DimDynamic.DYNAMIC, *(DimDynamic.STATIC for _ in images.shape[1:])]
            any_batch = mode.from_tensor(images, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
            with contextlib.suppress(_Written):
                compile_fx(program, [on_gpu(any_batch)])
    finally:
        GraphLowering.codegen = original  # type: ignore[method-assign]
    assert written, "Inductor wrote nothing"
    return written[0]


def written(module: nn.Module, *shapes: tuple[int, ...]) -> list[str]:
    """Outputs of each kernel that a module launches, by torch's own analysis: "kept_ptr,normed_ptr", sorted.

    Call without `pretend`, with which torch would look for the GPU when a module indexes a tensor.

    Args:
        shapes: Of its float32 inputs.
    """
    import triton
    from torch._functorch.aot_autograd import aot_export_module
    from torch._subclasses.fake_tensor import FakeTensorMode

    triton.runtime.driver.set_active(_Driver())
    with FakeTensorMode():
        inputs = [torch.empty(shape, device=DEVICE) for shape in shapes]
        traced, _ = aot_export_module(module, inputs, trace_joint=False)
    calls = [node for node in traced.graph.nodes if "triton_kernel" in node.name]
    return sorted(",".join(sorted(node.kwargs["tensors_to_clone"])) for node in calls)


def launches(code: str) -> list[str]:
    """Names of the calls in the wrapper, in order: kernels (ours and Inductor's) and library products."""
    body = code[code.index("def call(") :]
    found = re.findall(r"^ +(?:(\w+)\.run\(|extern_kernels\.(\w+)\(|(torch\.ops\.[\w.]+)\()", body, flags=re.MULTILINE)
    return [re.sub(r"_\d+$", "", next(filter(None, names))) for names in found]


def compile_ours(code: str) -> list[str]:
    """Compile the kernels of ours in Inductor's code, as it wrote them, for the H200.

    Inductor copies a kernel's source with helpers and constants that it finds, and specialises arguments that are 1.

    Args:
        code: From `inductor_code`.

    Returns:
        Their names in the code.
    """
    import importlib.util
    import tempfile
    from pathlib import Path

    import torch._inductor.runtime.triton_heuristics as heuristics
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    taken: dict[str, tuple[Any, Any, Any]] = {}

    def user_autotune(configs: Any, triton_meta: Any, inductor_meta: Any, **_: Any) -> Any:
        def keep(kernel: Any) -> Any:
            taken[inductor_meta["kernel_name"]] = (kernel, configs[0], triton_meta)
            return kernel

        return keep

    original, heuristics.user_autotune = heuristics.user_autotune, user_autotune
    try:
        with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's source from its file
            pieces = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, flags=re.DOTALL)
            for number, piece in enumerate(piece for piece in pieces if "user_autotune" in piece):
                path = Path(folder) / f"kernel_{number}.py"
                path.write_text(piece.replace("\\\\", "\\"))
                spec = importlib.util.spec_from_file_location(f"kernel_{number}", path)
                assert spec is not None
                assert spec.loader is not None
                spec.loader.exec_module(importlib.util.module_from_spec(spec))
            for kernel, config, meta in taken.values():
                source = ASTSource(kernel, meta["signature"], meta["constants"], meta["configs"][0])
                options = {each: config[each] for each in ("num_warps", "num_stages")}
                triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    finally:
        heuristics.user_autotune = original
    return list(taken)
