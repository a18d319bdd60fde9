"""Compare the outputs of the reduced engine with those of its baseline: the dense model, or another bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np

from vp_exporter.data.image_folder import Batch
from vp_exporter.errors import DataError, VpError
from vp_exporter.utils.distributed import Workers, single
from vp_exporter.utils.progress import SILENT, Progress
from vp_exporter.validation.baseline import DENSE, Baseline
from vp_exporter.validation.finite import nonfinite_rows
from vp_exporter.validation.intervals import Interval, bootstrap_mean, mcnemar_exact, paired_difference, wilson

OUTPUT = "logits"
NAMED_FAILURES = 5


class RunnerLike(Protocol):
    """Interface of an engine, implemented by vp_engines.backends.base.Runner."""

    def run(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """Map float32 [B, 3, H, W] to {"logits": float32 [B, classes]}."""
        ...


class Data(Sized, Protocol):
    """Interface of the images, implemented by vp_exporter.data.image_folder.ImageFolder."""

    @property
    def labelled(self) -> bool: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def skipped(self) -> list[tuple[str, str]]: ...
    def batches(self, batch_size: int) -> Iterator[Batch]: ...
    def part(self, rank: int, world: int, batch_size: int) -> Data: ...
    def rejoin(self, skipped: Sequence[tuple[str, str]]) -> None: ...


@dataclass(frozen=True)
class Parity:
    """Differences between the reduced engine and the reduced PyTorch model, on the first `images` images.

    They show the effect of lowering and of the engine, separately from that of the plan.

    Attributes:
        max_abs, mean_abs: Absolute difference of the logits; None if any is not finite.
        relative: Root mean square of the difference over that of PyTorch's logits; None likewise.
        same_top1: Images with the same top-1 class.
        nonfinite: Images with a NaN or infinite logit on either side.
    """

    images: int
    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    same_top1: int
    nonfinite: int


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of the dense and the reduced engine on the same images.

    "Dense" stands for the baseline, which may also be another bundle (`Baseline`).

    If a model outputs a NaN or an infinity for an image, the image counts as wrong for that model and as a
    disagreement, `kl` is None, and `finite` is False, which fails every verdict.

    Attributes:
        images: Images scored.
        skipped: Files that could not be decoded.
        num_classes: Classes of the model.
        dense_top1, reduced_top1: Percent; None without labels.
        dense_top5, reduced_top5: Percent; None without labels, or with five classes or fewer.
        top1_difference: Reduced minus dense, in percentage points, Agresti-Min interval; None without labels.
        only_dense_right, only_reduced_right: Images that only one of them classifies correctly; None without labels.
        mcnemar_p: McNemar's exact two-sided p-value; None without labels.
        agreement: Images with the same top-1 class in percent, Wilson interval.
        kl: Mean over the images of KL(dense || reduced) of the softmax, in nats, bootstrap interval.
        nonfinite_dense, nonfinite_reduced: Images with a NaN or an infinity in any output.
        nonfinite_images: File names of the first few of them.
        parity: Differences between engine and PyTorch; None without a reference.
    """

    images: int
    skipped: int
    num_classes: int
    dense_top1: float | None
    reduced_top1: float | None
    dense_top5: float | None
    reduced_top5: float | None
    top1_difference: Interval | None
    only_dense_right: int | None
    only_reduced_right: int | None
    mcnemar_p: float | None
    agreement: Interval
    kl: Interval | None
    nonfinite_dense: int
    nonfinite_reduced: int
    nonfinite_images: tuple[str, ...] = ()
    parity: Parity | None = None

    @property
    def labelled(self) -> bool:
        return self.top1_difference is not None

    @property
    def finite(self) -> bool:
        """Whether all outputs of the engines and of the reference were finite."""
        return not (self.nonfinite_dense or self.nonfinite_reduced or (self.parity and self.parity.nonfinite))

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values; intervals become {"value", "low", "high"}."""
        return {**asdict(self), "nonfinite_images": list(self.nonfinite_images)}


def evaluate(
    dense: RunnerLike,
    reduced: RunnerLike,
    data: Data,
    *,
    batch_size: int = 32,
    reference: Callable[[np.ndarray], np.ndarray] | None = None,
    reference_limit: int = 64,
    progress: Progress = SILENT,
    workers: Workers | None = None,
    baseline: Baseline = DENSE,
) -> Accuracy:
    """Run both engines over the same batches and compare their logits.

    Args:
        dense: Engine of the baseline.
        reference: The reduced model in PyTorch, images float32 [B, 3, H, W] -> logits [B, classes] (numpy), for
            `Accuracy.parity`.
        reference_limit: Number of images given to the reference, from the start; it is far slower than an engine.
        workers: Processes that share the images, each with its own engines; None for a single process. All must call
            this function, and all return the same result. If one fails, all raise its error after finishing their
            shares.
        baseline: Names of the two engines in warnings and errors.

    Raises:
        DataError: if the data cannot be read, or the logits do not match the number of classes.
        VpError: if `reference` is given with several processes, which would all wait for the one that runs it.
    """
    workers = workers or single()
    if workers.world > 1 and reference is not None:
        raise VpError(f"parity with PyTorch asked of {workers.world} processes", expected="one process")
    parity = None if reference is None else _ParityTally(reference, reference_limit)
    if workers.world == 1:
        tally = _score(dense, reduced, data, batch_size, progress, baseline, parity)
    else:
        tally = _score_share(dense, reduced, data, batch_size, progress, baseline, workers)
    if not tally.images:
        raise DataError("no image to validate on", fix="point to a folder of images")
    result = tally.result(len(data.skipped), parity.result() if parity is not None and parity.images else None)
    if not workers.leader:
        return result  # only the leader warns
    if not result.finite:
        progress.warn(
            f"NaN or infinite outputs: {baseline.label} {result.nonfinite_dense}, {baseline.own} "
            f"{result.nonfinite_reduced} of {result.images} images"
        )
    if result.dense_top1 is not None and result.images >= 20 and result.dense_top1 <= 150 / data.num_classes < 100:
        progress.warn(
            f"{baseline.name}'s top-1 is {result.dense_top1:.2f}%, about chance: the folders are probably not in the "
            "order of the model's classes, or the preprocessing is not the model's"
        )
    return result


def _score(
    dense: RunnerLike,
    reduced: RunnerLike,
    data: Data,
    batch_size: int,
    progress: Progress,
    baseline: Baseline,
    parity: _ParityTally | None = None,
) -> _Tally:
    tally = _Tally(data.num_classes, data.labelled)
    steps = math.ceil(len(data) / batch_size)
    what = f"comparing with {baseline.name}"
    for batch in progress.track(data.batches(batch_size), total=steps, description=what):
        first = _logits(dense, batch, data.num_classes, baseline.engine)
        second = _logits(reduced, batch, data.num_classes, baseline.own_engine)
        tally.add(first, second, batch)
        if parity is not None:
            parity.add(batch.images, second)
    return tally


def _score_share(
    dense: RunnerLike,
    reduced: RunnerLike,
    data: Data,
    batch_size: int,
    progress: Progress,
    baseline: Baseline,
    workers: Workers,
) -> _Tally:
    """Score this process's share of the images. Returns the tally of all shares, on every process."""

    def mine() -> tuple[_Tally, list[tuple[str, str]]]:
        share = data.part(workers.rank, workers.world, batch_size)
        return _score(dense, reduced, share, batch_size, progress, baseline), share.skipped

    shares = workers.gather(workers.agree(mine))
    data.rejoin([entry for _, skipped in shares for entry in skipped])
    whole = _Tally(data.num_classes, data.labelled)
    for tally, _ in shares:
        whole.merge(tally)
    return whole


def kl_divergence(dense: np.ndarray, reduced: np.ndarray) -> np.ndarray:
    """KL(dense || reduced) of the softmax of each row, in nats.

    Args:
        dense, reduced: Logits [B, classes]. Computed in float64, stable for finite logits of any size.

    Returns:
        float64 [B], nonnegative.
    """
    log_p, log_q = _log_softmax(dense), _log_softmax(reduced)
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(axis=1), 0.0)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _rank(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rank of each row's label, 0 for the highest logit. Ties are ordered by class index, as in argmax."""
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    earlier = np.arange(logits.shape[1])[None] < labels[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(axis=1)


def _logits(runner: RunnerLike, batch: Batch, num_classes: int, which: str) -> np.ndarray:
    """Run an engine. Returns logits, float64 [B, classes], NaN for images with any other output that is not finite."""
    outputs = runner.run(batch.images)
    if OUTPUT not in outputs:
        raise DataError(f"{which}'s outputs are {sorted(outputs)}", expected=f"one named {OUTPUT!r}")
    _check_logits(outputs[OUTPUT], len(batch.images), num_classes, which)
    logits: np.ndarray = outputs[OUTPUT].astype(np.float64)
    if len(outputs) > 1:
        logits[nonfinite_rows(outputs, len(logits))] = np.nan
    return logits


def _check_logits(logits: np.ndarray, rows: int, num_classes: int, which: str) -> None:
    if logits.shape != (rows, num_classes):
        raise DataError(f"{which}'s logits have shape {list(logits.shape)}", expected=f"[{rows}, {num_classes}]")


@dataclass
class _Tally:
    """Accumulates per-image results."""

    num_classes: int
    labelled: bool
    images: int = 0
    only_dense: int = 0
    only_reduced: int = 0
    agree: int = 0
    top1: list[int] = field(default_factory=lambda: [0, 0])  # dense, reduced
    top5: list[int] = field(default_factory=lambda: [0, 0])
    bad: list[int] = field(default_factory=lambda: [0, 0])
    bad_names: list[str] = field(default_factory=list)
    kl: list[np.ndarray] = field(default_factory=list)

    def add(self, dense: np.ndarray, reduced: np.ndarray, batch: Batch) -> None:
        finite = [np.isfinite(logits).all(axis=1) for logits in (dense, reduced)]
        both = finite[0] & finite[1]
        self.images += len(dense)
        self.agree += int((both & (dense.argmax(axis=1) == reduced.argmax(axis=1))).sum())
        self.kl.append(kl_divergence(dense[both], reduced[both]))
        for i, ok in enumerate(finite):
            self.bad[i] += int((~ok).sum())
        self.bad_names += [path.name for path, ok in zip(batch.paths, both, strict=True) if not ok]
        if not self.labelled:
            return
        assert batch.labels is not None
        right = []
        for i, logits in enumerate((dense, reduced)):
            rank = _rank(logits, batch.labels)
            right.append(finite[i] & (rank == 0))
            self.top1[i] += int(right[i].sum())
            self.top5[i] += int((finite[i] & (rank < 5)).sum())
        self.only_dense += int((right[0] & ~right[1]).sum())
        self.only_reduced += int((right[1] & ~right[0]).sum())

    def merge(self, later: _Tally) -> None:
        """Add the tally of the images that follow. The order matters: the bootstrap samples by position."""
        self.images += later.images
        self.only_dense += later.only_dense
        self.only_reduced += later.only_reduced
        self.agree += later.agree
        for mine, its in ((self.top1, later.top1), (self.top5, later.top5), (self.bad, later.bad)):
            mine[:] = [a + b for a, b in zip(mine, its, strict=True)]
        self.bad_names += later.bad_names
        self.kl += later.kl

    def result(self, skipped: int, parity: Parity | None) -> Accuracy:
        def percent(count: int, wanted: bool) -> float | None:
            return 100 * count / self.images if wanted else None

        difference = paired_difference(self.only_dense, self.only_reduced, self.images).scaled(100)
        top5 = self.labelled and self.num_classes > 5
        return Accuracy(
            images=self.images,
            skipped=skipped,
            num_classes=self.num_classes,
            dense_top1=percent(self.top1[0], self.labelled),
            reduced_top1=percent(self.top1[1], self.labelled),
            dense_top5=percent(self.top5[0], top5),
            reduced_top5=percent(self.top5[1], top5),
            top1_difference=difference if self.labelled else None,
            only_dense_right=self.only_dense if self.labelled else None,
            only_reduced_right=self.only_reduced if self.labelled else None,
            mcnemar_p=mcnemar_exact(self.only_dense, self.only_reduced) if self.labelled else None,
            agreement=wilson(self.agree, self.images).scaled(100),
            kl=None if any(self.bad) else bootstrap_mean(np.concatenate(self.kl)),
            nonfinite_dense=self.bad[0],
            nonfinite_reduced=self.bad[1],
            nonfinite_images=tuple(self.bad_names[:NAMED_FAILURES]),
            parity=parity,
        )


class _ParityTally:
    """Accumulates logits of the reduced engine and of the reference for the first `limit` images."""

    def __init__(self, reference: Callable[[np.ndarray], np.ndarray], limit: int) -> None:
        self.images = 0
        self._reference, self._limit = reference, limit
        self._expected: list[np.ndarray] = []
        self._got: list[np.ndarray] = []

    def add(self, images: np.ndarray, got: np.ndarray) -> None:
        rows = min(self._limit - self.images, len(images))
        if rows <= 0:
            return
        expected = np.asarray(self._reference(images[:rows]))
        _check_logits(expected, rows, got.shape[1], "PyTorch")
        self.images += rows
        self._expected.append(expected.astype(np.float64))
        self._got.append(got[:rows])

    def result(self) -> Parity:
        expected, got = np.concatenate(self._expected), np.concatenate(self._got)
        finite = np.isfinite(expected).all(axis=1) & np.isfinite(got).all(axis=1)
        same = int((finite & (expected.argmax(axis=1) == got.argmax(axis=1))).sum())
        if not finite.all():
            return Parity(self.images, None, None, None, same, int((~finite).sum()))
        error = np.abs(expected - got)
        scale = math.sqrt(float((expected**2).mean()))
        relative = math.sqrt(float((error**2).mean())) / scale if scale else None
        return Parity(self.images, float(error.max()), float(error.mean()), relative, same, 0)
