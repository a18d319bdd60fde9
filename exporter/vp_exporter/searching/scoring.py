"""What a plan costs in answers: KL of the dense model to the reduced one, image by image."""

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

COMPARED = 128  # search images that candidates are compared on: on the same images their mean roots differ by little

# What a search has measured, by plan and batch: logits as nested lists (JSON). A checkpoint keeps it, and a search that
# is run again from the start meets the same questions and finds them answered.
Memo = MutableMapping[str, list[list[float]]]


@dataclass(frozen=True)
class Score:
    """A plan on some images: mean KL of dense to reduced in nats, agreement and top-1 in percent."""

    kl: float
    agreement: float
    top1: float | None
    images: int

    def to_dict(self) -> dict[str, Any]:
        return {"kl": self.kl, "agreement": self.agreement, "top1": self.top1, "images": self.images}


class Scorer:
    """Runs plans over the calibration images.

    Args:
        vit, description: the model, fp32, on the images' device.
        calibration: the images.
        workers: batches are split over them.
        memo: kept answers; see `Memo`.

    Attributes:
        evaluations: plans run on some batches (answers from the memo not counted).
        images_seen: images run through a reduced model, in part or whole.
        blocks_run, blocks_asked: batches through blocks, and what they would have been without shared prefixes.
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
        """A scorer that searches on `Calibration.first(images)` and holds out all others; answers are shared."""
        scorer = copy.copy(self)
        scorer.calibration = self.calibration.holding_out(images)
        scorer.forget()
        return scorer

    def losses(self, plan: ReductionPlan, batches: Sequence[int], temperature: float | None = None) -> Tensor:
        """KL(dense || reduced) of each image, or a tamer measure of the same to search by.

        The mean KL hangs on the few images whose answer changes: two halves of 368 images put 20 plans in unrelated
        orders. What a search goes by is the root of the KL softened by a temperature. To first order that is the
        length of the change of the logits; every image has its say, and it foretells the KL on other images better
        than the KL itself does (docs/search.md).

        Args:
            temperature: of what a search goes by; None for the plain KL, which decides what is kept.

        Returns:
            float64 [n], nats or their root, in the order of the batches, the same on every process.

        Raises:
            SearchError: logits that are not finite; PlanError: a plan for another model.
        """
        logits = self.logits(plan, batches)
        dense = torch.cat([self.calibration.dense(batch) for batch in batches])
        return kl(dense, logits) if temperature is None else kl(dense, logits, temperature).sqrt()

    def loss(self, plan: ReductionPlan, batches: Sequence[int], temperature: float | None = None) -> float:
        """Their mean."""
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
        """Keep what leaves each block under `plan`: a plan that begins alike is computed from where it differs.

        It takes the place of the plan remembered before. Costs memory: tokens x width x blocks x images x 4 bytes.

        Args:
            batches: to run it on now; others are kept when they are next run.
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
        """Give the memory back."""
        self._remembered, self._remembered_keys, self._streams = None, [], {}

    @torch.inference_mode()
    def _run(self, model: ReducedViT, keys: list[str], batch: int) -> Tensor:
        """Logits [b, C] of one batch, from the deepest block that the remembered plan shares."""
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
    """What enters a reduced model's first block."""
    return Stream(
        model.embed(images.to(model.vit.patch_embed.proj.weight.dtype)),
        model.description.prefix_tokens,
        positions=model.places,
        columns=model.description.grid[1],
    )


def kl(dense: Tensor, reduced: Tensor, temperature: float = 1.0) -> Tensor:
    """temperature^2 * KL(softmax(dense / temperature) || softmax(reduced / temperature)): float64 [n], at least 0."""
    p = F.log_softmax(dense.double() / temperature, dim=1)
    q = F.log_softmax(reduced.double() / temperature, dim=1)
    return temperature**2 * (p.exp() * (p - q)).sum(dim=1).clamp_min(0.0)


def merit(plain: float, root: float) -> float:
    """What the choice between plans hangs on, the less the better: the mean of their two losses' logarithms.

    A plan's mean KL and the square of its mean root KL estimate nearly the same: one is carried by the few images whose
    answer changes, the other one by all images, and their errors have little to do with each other.

    Args:
        plain: mean KL, nats; root: mean root of the softened KL (Scorer.losses), of the same images.
    """
    return (math.log(max(plain, 1e-12)) + 2 * math.log(max(root, 1e-6))) / 2


def settled(losses: Sequence[tuple[float, float]]) -> int:
    """Which plan is kept: the least `merit` where the mean KL is not above the first plan's; of equals the first.

    Args:
        losses: of each plan on the held-out images, as `merit` takes them; first the one to beat.
    """
    sound = [i for i, (plain, _) in enumerate(losses) if plain <= losses[0][0]]
    return min(sound, key=lambda i: merit(*losses[i]))


def block_keys(plan: ReductionPlan) -> list[str]:
    """For each block a name of all that decides what leaves it: plans with one name there share everything up to it."""
    data = plan.to_dict()
    inner = [step for step in plan.steps if isinstance(step, InnerStep)]
    # Places in the grid flow from the front where a later step asks for them; sizes begin at the first inner step.
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
    """How many blocks from the front two plans share."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count


@contextmanager
def frozen(vit: nn.Module) -> Iterator[None]:
    """No gradients for the weights, so that activations which only they need are not kept; as they were afterwards."""
    asked = [parameter for parameter in vit.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
