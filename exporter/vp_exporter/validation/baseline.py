"""Baseline of a bundle: its own dense engine, or another bundle that it can be compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vp_engines.errors import BundleError
from vp_engines.manifest import BatchRange, Manifest


@dataclass(frozen=True)
class Baseline:
    """Baseline of a comparison, with its names in tables and sentences.

    Attributes:
        kind: "dense", the bundle's own dense engine, or "bundle", the reduced engine of another bundle.
        label: Name in columns and legends: "dense", or the other bundle's name.
        own: Name of the engine compared with it: "reduced", or this bundle's name.
        name: Name in a sentence: "the dense model", or the other bundle's name.
        setting: Follows the name: "on the same engine", or the engine and precision if they differ.
        macs: The baseline's multiply-accumulates per image; None if unknown.
        efficient: Whether realised efficiency may be stated. It is only meaningful within one engine, precision and set
            of kernels; otherwise the speed-up is not due to the saved work alone.
        facts: Facts for a report; empty for the dense engine, because they are the bundle's own.
        notes: Notes for readers of the comparison, one line each.
    """

    kind: Literal["dense", "bundle"] = "dense"
    label: str = "dense"
    own: str = "reduced"
    name: str = "the dense model"
    setting: str = "on the same engine"
    macs: float | None = None
    efficient: bool = True
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def engine(self) -> str:
        """Name of the baseline's engine in a sentence."""
        return "the dense engine" if self.kind == "dense" else self.label

    @property
    def own_engine(self) -> str:
        return "the reduced engine" if self.kind == "dense" else self.own


DENSE = Baseline()


def bundle_baseline(
    path: Path, manifest: Manifest, other_path: Path, other: Manifest, *, device: str | None = None
) -> Baseline:
    """Create a baseline from the reduced engine of another bundle.

    Args:
        path, manifest: The bundle to validate.
        other_path, other: The bundle to compare it with.
        device: Device to run both on; None for the one that each was built for.

    Raises:
        BundleError: if the two differ in input images, outputs, classes, preprocessing or device, or have no batch size
            in common.
    """
    own, label = path.resolve().name, other_path.resolve().name
    check_runs_alike(own, manifest, label, other, device=device)
    _check_answers(own, manifest, label, other)
    _check_preprocessing(own, manifest, label, other)
    if label == own:
        label = f"{label} (baseline)"
    mine, its = manifest.engine, other.engine
    alike = (mine.name, mine.precision) == (its.name, its.precision)
    setting = "on the same engine" if alike else f"({_engine(other)}; {own} is {_engine(manifest)})"
    return Baseline(
        kind="bundle",
        label=label,
        own=own,
        name=label,
        setting=setting,
        macs=other.plan.macs_reduced,
        efficient=alike and manifest.kernels == other.kernels,
        facts={
            "bundle": other_path.resolve().name,
            "model": other.model.name,
            "weights": other.model.weights_source,
            "weights sha256": other.model.weights_sha256,
            "engine": f"{its.name} {its.version}, {its.precision}, {its.device}",
            "kernels": other.kernels,
            "method": other.plan.method,
            "fingerprint": other.plan.fingerprint,
            "macs": other.plan.macs_reduced,
        },
        notes=_notes(path, own, manifest, other_path, label, other),
    )


def check_runs_alike(own: str, manifest: Manifest, label: str, other: Manifest, *, device: str | None = None) -> None:
    """Check that the engines of two bundles accept the same images and run on the same kind of device.

    Raises:
        BundleError: if they do not, or have no batch size in common.
    """
    mine, its = manifest.inputs[0], other.inputs[0]
    if (mine.dtype, mine.shape[1:]) != (its.dtype, its.shape[1:]):
        raise BundleError(
            f"{label} takes images of {_shape(its.shape[1:])}",
            expected=f"{_shape(mine.shape[1:])}, as {own}",
            fix="compare bundles of one input size",
        )
    devices = [device or each.engine.device for each in (manifest, other)]
    if devices[0] != devices[1]:
        raise BundleError(
            f"{label} runs on {devices[1]}",
            expected=f"{devices[0]}, as {own}",
            fix="compare bundles of one device, or name one that both run on with `device`",
        )
    common = common_batches(manifest, other)
    if common is not None and common[0] > common[1]:
        raise BundleError(
            f"{label} was built for batches of {_range(other.engine.batch)}",
            expected=f"one of {_range(manifest.engine.batch)}, which {own} was built for",
            fix="export one of them again with the other's `min_batch` and `max_batch`",
        )


def common_batches(*manifests: Manifest) -> tuple[int, int] | None:
    """Smallest and largest batch size that all engines support; None for any, smallest > largest for none."""
    ranges = [found for each in manifests if (found := each.engine.batch) is not None]
    return (max(each.min for each in ranges), min(each.max for each in ranges)) if ranges else None


def _check_answers(own: str, manifest: Manifest, label: str, other: Manifest) -> None:
    mine, its = ({tensor.name: tensor.shape[1:] for tensor in each.outputs} for each in (manifest, other))
    if manifest.model.num_classes != other.model.num_classes:
        raise BundleError(
            f"{label} has {_classes(other.model.num_classes)}",
            expected=f"{_classes(manifest.model.num_classes)}, as {own}",
            fix="compare bundles of one task",
        )
    if mine != its:
        raise BundleError(
            f"{label} gives {_outputs(its)}",
            expected=f"{_outputs(mine)}, as {own}",
            fix="compare bundles with the same outputs",
        )
    names, others = manifest.classes, other.classes
    if names is None or others is None or tuple(names) == tuple(others):
        return
    if sorted(names) == sorted(others):
        raise BundleError(
            f"{label} has the classes of {own} in another order",
            expected="one order of the logits",
            fix="export one of them again with the other's `classes`",
        )
    at = next(i for i, (a, b) in enumerate(zip(names, others, strict=True)) if a != b)
    raise BundleError(
        f"class {at} of {label} is {others[at]!r}",
        expected=f"{names[at]!r}, as {own}",
        fix="compare bundles of the same classes",
    )


def _check_preprocessing(own: str, manifest: Manifest, label: str, other: Manifest) -> None:
    mine, its = manifest.preprocessing, other.preprocessing
    for name in ("resize", "crop_mode", "interpolation", "mean", "std"):
        first, second = getattr(mine, name), getattr(its, name)
        if not _same(first, second):
            raise BundleError(
                f"{label} prepares its images with {name.replace('_', ' ')} {_plain(second)}",
                expected=f"{_plain(first)}, as {own}",
                fix="compare bundles that see the same pixels",
            )


def _notes(path: Path, own: str, manifest: Manifest, other_path: Path, label: str, other: Manifest) -> tuple[str, ...]:
    notes = [f"The baseline is the bundle {other_path.resolve().name}, not this bundle's own dense engine."]
    if path.resolve() == other_path.resolve():
        notes.append("It is this very bundle: every difference is noise.")
    if manifest.model.weights_sha256 != other.model.weights_sha256:
        notes.append(
            f"{label} holds other weights ({other.model.name}, {other.model.weights_source}): differences of the "
            "answers are those of two models, not of a plan alone."
        )
    mine, its = manifest.engine, other.engine
    if (mine.name, mine.precision) != (its.name, its.precision):
        notes.append(
            f"{own} is {_engine(manifest)}, {label} is {_engine(other)}: realised efficiency is a claim within one "
            "engine and precision, so none is stated."
        )
    elif manifest.kernels != other.kernels:
        notes.append(
            f"{own} has {manifest.kernels} kernels, {label} has {other.kernels}: realised efficiency is a claim within "
            "one set of kernels, so none is stated."
        )
    return tuple(notes)


def _engine(manifest: Manifest) -> str:
    return f"{manifest.engine.name} {manifest.engine.precision}"


def _same(first: object, second: object) -> bool:
    if isinstance(first, tuple) and isinstance(second, tuple) and len(first) == len(second):
        return all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(first, second, strict=True))
    return first == second


def _plain(value: object) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _shape(shape: Sequence[int | str]) -> str:
    return "x".join(map(str, shape))


def _range(batch: BatchRange | None) -> str:
    return "any size" if batch is None else f"{batch.min} to {batch.max}"


def _classes(count: int) -> str:
    return f"{count} classes" if count else "no classes (features)"


def _outputs(outputs: Mapping[str, Sequence[int | str]]) -> str:
    return ", ".join(f"{name} of {_shape(shape)}" for name, shape in outputs.items())
