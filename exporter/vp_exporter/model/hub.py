"""Model names of timm: plain, `timm/NAME`, `hf-hub:org/name` and `local-dir:FOLDER`."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm

from vp_exporter.errors import UnsupportedModelError, WeightsError

CONFIG = "config.json"
# Weight files in a model's folder, in timm's order of preference.
FOLDER_WEIGHTS = (
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
_SOURCES = {"hf-hub": "hf-hub", "hf_hub": "hf-hub", "local-dir": "local-dir", "local_dir": "local-dir"}
_TIMEOUT = 5.0  # seconds to wait for the hub's first response


@dataclass(frozen=True)
class ModelName:
    """A name for timm.create_model.

    Attributes:
        text: The name to pass to timm.
        source: "hf-hub", "local-dir", or None for timm's own models.
        place: Hub id or folder; "" for timm's own models.
    """

    text: str
    source: str | None = None
    place: str = ""

    @property
    def folder(self) -> Path | None:
        return Path(self.place).expanduser() if self.source == "local-dir" else None


def parse_name(name: str) -> ModelName:
    """Parse a model's name.

    Raises:
        UnsupportedModelError: if timm does not know it; suggests similar names, or a missing prefix.
    """
    prefix, colon, rest = name.partition(":")
    if colon and prefix.lower() in _SOURCES:
        source = _SOURCES[prefix.lower()]
        if not rest:
            raise UnsupportedModelError(f"the model {name!r} names nothing", expected=f"{source}:{_example(source)}")
        if source == "local-dir":
            folder = Path(rest).expanduser()
            _check_folder(folder)
            return ModelName(f"{source}:{folder}", source, str(folder))
        return ModelName(f"{source}:{rest}", source, rest)
    if name.startswith("timm/") and timm.is_model(name.removeprefix("timm/")):
        return ModelName(name.removeprefix("timm/"))  # timm's hub repositories hold its pretrained models
    if timm.is_model(name):
        return ModelName(name)
    raise _unknown(name)


def _example(source: str) -> str:
    return "FOLDER" if source == "local-dir" else "ORGANISATION/NAME"


def _unknown(name: str) -> UnsupportedModelError:
    found = f"timm {timm.__version__} has no model {name!r}"
    if (Path(name).expanduser() / CONFIG).is_file():
        return UnsupportedModelError(found, expected="a timm model name", fix=f"for this folder give local-dir:{name}")
    if "/" in name and ":" not in name:
        return UnsupportedModelError(
            found,
            expected="a timm model name",
            fix=f"give hf-hub:{name} for a model on the hub, or local-dir:{name} for a folder with its {CONFIG}",
        )
    near = difflib.get_close_matches(name.split(".", 1)[0].split("/")[-1], timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
    return UnsupportedModelError(found, expected="a timm model name", fix=hint)


def _check_folder(folder: Path) -> None:
    expected = f"a folder with {CONFIG} and the weights, as timm.models.save_for_hf writes it"
    if not folder.is_dir():
        raise UnsupportedModelError(f"there is no folder {folder}", expected=expected)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModelError(f"{folder} holds no {CONFIG}", expected=expected) from None
    except (OSError, ValueError) as error:
        raise UnsupportedModelError(f"cannot read {folder / CONFIG}: {error}", expected=expected) from None
    if not isinstance(config, dict) or "architecture" not in config:
        found = f"{folder / CONFIG} names no timm architecture"
        fix = ""
        if isinstance(config, dict) and "model_type" in config:
            found += f": it is of transformers' {str(config['model_type'])!r}"
            fix = f"name the timm model with `model`, and its weights with `weights={folder / FOLDER_WEIGHTS[0]}`"
        raise UnsupportedModelError(found, expected=expected, fix=fix)
    if not timm.is_model(str(config["architecture"])):
        raise UnsupportedModelError(
            f"timm {timm.__version__} has no model {config['architecture']!r}, which {folder / CONFIG} names",
            expected="a timm model name",
        )


def folder_weights(folder: Path) -> Path:
    """Weight file in a model's folder, chosen as timm does.

    Raises:
        WeightsError: if there is none.
    """
    for name in FOLDER_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    for suffix in (".safetensors", ".pth", ".pth.tar", ".bin"):
        files = sorted(folder.glob(f"*{suffix}"))
        if len(files) == 1:
            return files[0]
        if files:
            raise WeightsError(
                f"{folder} holds {len(files)} files *{suffix}", expected="one, or model.safetensors",
                fix=f"name one with `weights`, such as {files[0]}",
            )  # fmt: skip
    raise WeightsError(f"{folder} holds no weights", expected=" or ".join(FOLDER_WEIGHTS[:2]))


@contextlib.contextmanager
def hub_at_hand() -> Iterator[bool]:
    """Yield whether the hub responds; if not, make huggingface_hub use its cache alone within the context.

    Avoids the client's retries, about a minute for each file.
    """
    try:
        from huggingface_hub import constants
    except ImportError:  # timm reports it
        yield True
        return
    logger = logging.getLogger("huggingface_hub")
    offline, level = constants.HF_HUB_OFFLINE, logger.level
    answers = not offline and _answers(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = not answers
    logger.setLevel(logging.ERROR)
    try:
        yield answers
    finally:
        constants.HF_HUB_OFFLINE = offline
        logger.setLevel(level)


def _answers(endpoint: str) -> bool:
    from huggingface_hub.utils import get_session

    try:
        get_session().head(endpoint, timeout=_TIMEOUT)
    except Exception:  # the client's exceptions depend on its HTTP library and version
        return False
    return True
