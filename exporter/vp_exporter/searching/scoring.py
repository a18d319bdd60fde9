"""Score plans by the KL divergence of the reduced from the dense model, image by image."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from vp_exporter.errors import SearchError
from vp_exporter.model.spec import ModelSpec
from vp_exporter.plan import ReductionPlan
from vp_exporter.reducers import InnerStep
from vp_exporter.reducers.stream import Stream
from vp_exporter.rewrite.reduced_vit import ReducedViT
from vp_exporter.searching.calibration import Calibration
from vp_exporter.utils.distributed import Workers, single

COMPARED = 128  # search images for comparing candidates: on equal images, mean roots have little variance

# Measured logits by plan and batch, as nested lists (JSON). Stored in a checkpoint, so that a restarted search finds
# its questions answered.
Memo = MutableMapping[str, list[list[float]]]


@dataclass(frozen=True)
class Score:
    """Score of a plan: mean KL of dense to reduced in nats, agreement and top-1 in percent."""

    kl: float
    agreement: float
    top1: float | None
    images: int

    def to_dict(self) -> dict[str, Any]:
        return {"kl": self.kl, "agreement": self.agreement, "top1": self.top1, "images": self.images}


class Scorer:
    """Runs plans on the calibration images.

    Args:
        vit, description: The model, fp32, on the images' device.
        calibration: The images.
        workers: Processes that share the batches.
        memo: Stored logits, see `Memo`.

    Attributes:
        evaluations: Number of plans run on some batches (not counting answers from the memo).
        images_seen: Number of images run through a reduced model, in part or completely.
        blocks_run, blocks_asked: Batches run through blocks, with and without sharing prefixes.
    """

    def __init__(
        self,
        vit: nn.Module,
        description: ModelSpec,
        calibration: Calibration,
        workers: Workers | None = None,
        memo: Memo | None = None,
    ) -> None:
        self.vit, self.description, self.calibration = vit, description, calibration
        self.workers, self.device = workers or single(), next(vit.parameters()).device
        self.memo: Memo = {} if memo is None else memo
        self.evaluations = self.images_seen = self.blocks_run = self.blocks_asked = 0
        self._remembered: ReductionPlan | None = None
        self._remembered_keys: list[str] = []
        self._streams: dict[int, list[Stream]] = {}

    def holding_out(self, images: int) -> Scorer:
        """A scorer that searches on `Calibration.first(images)` and holds out all others; shares the memo."""
        scorer = copy.copy(self)
        scorer.calibration = self.calibration.holding_out(images)
        scorer.forget()
        return scorer

    def losses(self, plan: ReductionPlan, batches: Sequence[int], temperature: float | None = None) -> Tensor:
        """KL(dense || reduced) of each image, or a more robust loss for searching.

        The mean KL is dominated by the few images whose prediction changes: two halves of 368 images rank 20 plans in
        unrelated orders. Searches use the root of the KL softened by a temperature. To first order it is the norm of
        the change of the logits; every image contributes, and it predicts the KL on other images better than the KL
        itself (docs/search.md).

        Args:
            temperature: For the search loss; None for the plain KL, which decides what is kept.

        Returns:
            float64 [n], nats or their root, in the order of the batches, equal on every process.

        Raises:
            SearchError: if logits are not finite.
            PlanError: if the plan is for another model.
        """
        logits = self.logits(plan, batches)
        dense = torch.cat([self.calibration.dense(batch) for batch in batches])
        return kl(dense, logits) if temperature is None else kl(dense, logits, temperature).sqrt()

    def loss(self, plan: ReductionPlan, batches: Sequence[int], temperature: float | None = None) -> float:
        """Mean of `losses`."""
        return float(self.losses(plan, batches, temperature).mean())

    def score(self, plan: ReductionPlan, batches: Sequence[int]) -> Score:
        """KL, agreement and (with labels) top-1."""
        logits = self.logits(plan, batches)
        dense = torch.cat([self.calibration.dense(batch) for batch in batches])
        parts = [self.calibration.labels(batch) for batch in batches]
        known = [part for part in parts if part is not None]
        answer = logits.argmax(dim=1)
        return Score(
            kl=float(kl(dense, logits).mean()),
            agreement=100 * float((answer == dense.argmax(dim=1)).double().mean()),
            top1=100 * float((answer == torch.cat(known)).double().mean()) if len(known) == len(parts) else None,
            images=len(logits),
        )

    def logits(self, plan: ReductionPlan, batches: Sequence[int]) -> Tensor:
        """float32 [n, C] on the CPU, in the order of the batches."""
        name = plan.fingerprint()
        missing = [batch for batch in batches if f"{name}/{batch}" not in self.memo]
        if missing:
            model = ReducedViT(self.vit, self.description, plan).to(self.device)
            keys = block_keys(plan)
            self.evaluations += 1
            self.images_seen += self.calibration.count(missing)
            for batch, part in zip(
                missing, self.workers.map(lambda batch: self._run(model, keys, batch), missing), strict=True
            ):
                if not torch.isfinite(part).all():
                    raise SearchError(
                        f"the reduced model gives NaN or infinite logits (plan {name[:12]}, batch {batch})",
                        expected="finite logits", fix="check the weights; run the search in fp32",
                    )  # fmt: skip
                self.memo[f"{name}/{batch}"] = part.tolist()
        return torch.tensor([row for batch in batches for row in self.memo[f"{name}/{batch}"]], dtype=torch.float32)

    def remember(self, plan: ReductionPlan, batches: Sequence[int] = ()) -> None:
        """Store the output of each block under `plan`, to run plans with the same beginning from where they differ.

        Replaces the previously stored plan. Takes tokens x width x blocks x images x 4 bytes of memory.

        Args:
            batches: Batches to run now; others are stored when they are next run.
        """
        keys = block_keys(plan)
        shared = _shared(keys, self._remembered_keys)
        self._streams = {batch: streams[:shared] for batch, streams in self._streams.items()} if shared else {}
        self._remembered, self._remembered_keys = plan, keys
        if batches:
            model = ReducedViT(self.vit, self.description, plan).to(self.device)
            for batch in batches:
                if self.workers.owns(batch) and len(self._streams.get(batch, ())) < len(keys):
                    self._run(model, keys, batch)

    def forget(self) -> None:
        """Free the memory of `remember`."""
        self._remembered, self._remembered_keys, self._streams = None, [], {}

    @torch.inference_mode()
    def _run(self, model: ReducedViT, keys: list[str], batch: int) -> Tensor:
        """Logits [b, C] of one batch, starting after the last block shared with the stored plan."""
        kept = self._streams.get(batch, [])
        shared = min(_shared(keys, self._remembered_keys), len(kept))
        own = keys == self._remembered_keys
        streams: list[Stream] = list(kept[:shared])
        stream = streams[-1] if streams else None
        if stream is None:
            stream = embed(model, self.calibration.images(batch))
        for block in list(model.blocks)[shared:]:
            stream = block(stream)
            if own:
                streams.append(stream)
            self.blocks_run += 1
        self.blocks_asked += len(keys)
        if own:
            self._streams[batch] = streams
        head: Tensor = model.head(stream.x, stream.size, proportional=model.proportional)
        return head.float()


def embed(model: ReducedViT, images: Tensor) -> Stream:
    """Input of a reduced model's first block."""
    return Stream(
        model.embed(images.to(model.vit.patch_embed.proj.weight.dtype)),
        model.description.prefix_tokens,
        positions=model.places,
        columns=model.description.grid[1],
    )


def kl(dense: Tensor, reduced: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 * KL(softmax(dense / temperature) || softmax(reduced / temperature)): float64 [n], non-negative."""
    p = F.log_softmax(dense.double() / temperature, dim=1)
    q = F.log_softmax(reduced.double() / temperature, dim=1)
    return temperature**2 * (p.exp() * (p - q)).sum(dim=1).clamp_min(0.0)


def merit(plain: float, root: float) -> float:
    """Criterion for choosing between plans, lower is better: mean of the logs of two losses.

    A plan's mean KL and the square of its mean root KL estimate nearly the same quantity. One is dominated by the few
    images whose prediction changes, the other by all images, so their errors are almost independent.

    Args:
        plain: Mean KL, nats; root: mean root of the softened KL (Scorer.losses), on the same images.
    """
    return (math.log(max(plain, 1e-12)) + 2 * math.log(max(root, 1e-6))) / 2


def settled(losses: Sequence[tuple[float, float]]) -> int:
    """Index of the plan to keep: least `merit` among those of mean KL not above the first's; ties to the first.

    Args:
        losses: Held-out losses of each plan, as arguments of `merit`; the first is the one to beat.
    """
    sound = [i for i, (plain, _) in enumerate(losses) if plain <= losses[0][0]]
    return min(sound, key=lambda i: merit(*losses[i]))


def block_keys(plan: ReductionPlan) -> list[str]:
    """Key of everything that determines the output of each block: plans with equal keys share all up to that block."""
    data = plan.to_dict()
    inner = [step for step in plan.steps if isinstance(step, InnerStep)]
    # Grid positions are tracked up to the last step that needs them, sizes from the first inner step on.
    tracked = max((step.block for step in inner if "positions" in step.needs), default=-1)
    sizes = [plan.proportional_attention, any(step.carries_size for step in inner)]
    first = min((step.block for step in inner), default=plan.model.depth)
    names, name = [], json.dumps(tracked)
    for block in range(plan.model.depth):
        own = [step for step in data["steps"] if step["block"] == block]
        text = json.dumps([name, own, data["key_bias"].get(str(block)), sizes if block >= first else None])
        name = hashlib.sha256(text.encode()).hexdigest()
        names.append(name)
    return names


def _shared(first: Sequence[str], second: Sequence[str]) -> int:
    """Number of leading blocks that two plans share."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


@contextmanager
def frozen(vit: nn.Module) -> Iterator[None]:
    """Disable gradients of the weights within the context, so that activations needed only for them are not kept."""
    asked = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
