"""Export timm ViTs with token reduction to validated engine bundles.

    import timm, vp_exporter as vp

    vit = timm.create_model("deit_small_patch16_224", pretrained=True)
    plan = vp.build_plan("tome", vit, target_macs=0.65)
    done = vp.export(vit, plan, "deit_s.vpe", engine="ort", data="val/")
    print(done.report.verdict)

Importing this package imports neither torch nor any engine; names are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vp_engines.errors import (
    BuildError,
    BundleCorruptError,
    BundleError,
    BundleIncompatibleError,
    EngineUnavailableError,
    InputError,
    PackageMissingError,
    VpError,
)
from vp_exporter.errors import DataError, PlanError, SearchError, UnsupportedModelError, WeightsError

if TYPE_CHECKING:
    from vp_engines.engine import Engine, load
    from vp_exporter.api.bundles import profile, validate
    from vp_exporter.api.export import export
    from vp_exporter.api.plans import build_plan, reduce
    from vp_exporter.api.search import search
    from vp_exporter.exporting import ExportResult
    from vp_exporter.model.request import ModelRequest
    from vp_exporter.plan import ReductionPlan
    from vp_exporter.rewrite.reduced_vit import ReducedViT

    __version__: str

__all__ = [
    "BuildError",
    "BundleCorruptError",
    "BundleError",
    "BundleIncompatibleError",
    "DataError",
    "Engine",
    "EngineUnavailableError",
    "ExportResult",
    "InputError",
    "ModelRequest",
    "PackageMissingError",
    "PlanError",
    "ReducedViT",
    "ReductionPlan",
    "SearchError",
    "UnsupportedModelError",
    "VpError",
    "WeightsError",
    "__version__",
    "build_plan",
    "export",
    "load",
    "profile",
    "reduce",
    "search",
    "validate",
]

_LAZY = {
    "Engine": "vp_engines",
    "ExportResult": "vp_exporter.exporting",
    "ModelRequest": "vp_exporter.model.request",
    "ReducedViT": "vp_exporter.rewrite.reduced_vit",
    "ReductionPlan": "vp_exporter.plan",
    "__version__": "vp_engines",
    "build_plan": "vp_exporter.api.plans",
    "export": "vp_exporter.api.export",
    "load": "vp_engines",
    "profile": "vp_exporter.api.bundles",
    "reduce": "vp_exporter.api.plans",
    "search": "vp_exporter.api.search",
    "validate": "vp_exporter.api.bundles",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vp_exporter' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
