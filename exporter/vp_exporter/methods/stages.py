"""Methods that keep a share of the patch tokens at a few stages: evit, topk, bat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vp_exporter.errors import PlanError
from vp_exporter.methods.base import Family, Method, Steps, acting_blocks, listed, stage_blocks
from vp_exporter.methods.options import MethodOptions, label
from vp_exporter.methods.schedule import rounded, share_of
from vp_exporter.model.spec import ModelSpec

# BAT's split of the remaining tokens is not published (docs/reducers.md, methods). These two shares are our own, from
# the middle of the ranges that fit the method's figure; the arguments clusters and pairs override them.
CLUSTER_SHARE = 0.15
PAIR_SHARE = 0.08


@dataclass(frozen=True)
class StageMethod(Method):
    """Keeps ceil(keep rate x n) of the n patch tokens at each stage, or the counts listed in the argument tokens_out.

    evit keeps one more, the fused token, which counts as a patch token in the next stage, as in the authors' code.
    """

    def steps(self, request: MethodOptions, model: ModelSpec) -> Steps:
        blocks = acting_blocks(request, model, stage_blocks(model.depth))
        if request.keep_rate is not None:
            return self._at_rate(request, model, blocks, request.keep_rate)
        outs = listed(label("tokens_out", arg=True), request.args["tokens_out"], blocks, low=1)
        steps, left = [], model.patches
        for stage, (block, out) in enumerate(zip(blocks, outs, strict=True)):
            m = out - model.prefix_tokens
            if m != left:
                steps.append(self._step(request, model, block, stage, left, m, len(blocks)))
            left = m
        return tuple(steps)

    def family(self, request: MethodOptions, model: ModelSpec) -> Family:
        blocks = acting_blocks(request, model, stage_blocks(model.depth))
        least = 0.5 / model.patches  # ceil() makes this 1 at every stage

        def rate(u: float) -> float:
            return 1.0 - u * (1.0 - least)

        return Family(
            at=lambda u: self._at_rate(request, model, blocks, rate(u)),
            setting=lambda u: {"keep_rate": round(rate(u), 6)},
            bound=f"block {blocks[0]} is the first to reduce and keeps at least 1 patch token",
        )

    def _at_rate(self, request: MethodOptions, model: ModelSpec, blocks: tuple[int, ...], rate: float) -> Steps:
        steps, left = [], model.patches
        for stage, block in enumerate(blocks):
            kept = share_of(rate, left)
            if kept >= left:
                continue  # as in EViT's code: nothing is fused if every token stays
            m = kept + int(self._fuses(request))
            steps.append(self._step(request, model, block, stage, left, m, len(blocks)))
            left = m
        return tuple(steps)

    def _fuses(self, request: MethodOptions) -> bool:
        return self.name == "evit" and request.args.get("fuse", True) is True

    def _step(
        self, request: MethodOptions, model: ModelSpec, block: int, stage: int, n: int, m: int, stages: int
    ) -> Any:
        """One stage: n patch tokens enter, m leave."""
        values = {key: value for key, value in request.args.items() if key != "tokens_out"}
        if self.name == "evit":
            values.setdefault("fuse", True)
        if self.name == "bat":
            said = {key: _of_stage(key, value, stage, stages) for key, value in values.items()}
            clusters = said.get("clusters")
            known = isinstance(clusters, int) and 0 <= clusters <= m  # else the step rejects it
            values["clusters"], values["pairs"] = bat_split(n, m, clusters if known else None)
            values |= said
        return self.step(block, {"tokens_out": model.prefix_tokens + m, **values}, model)


def bat_split(n: int, m: int, clusters: int | None = None, pair_share: float = PAIR_SHARE) -> tuple[int, int]:
    """BAT's clusters and pairs to reduce n patch tokens to m. The split is our own, as none is published.

    Clusters: 15% of m, at least 1, unless given. Pairs: `pair_share` of the n_a = m - clusters + pairs attentive
    tokens, but at most half of the n - m removed ones; otherwise, near a keep rate of 1, there would be no token left
    to cluster.
    """
    if clusters is None:
        clusters = max(1, rounded(CLUSTER_SHARE * m))
    pairs = rounded(pair_share / (1 - pair_share) * (m - clusters))
    pairs = max(0, min(pairs, (n - m) // 2, m - clusters))  # p <= n_a // 2 with n_a = m - clusters + p
    return clusters, pairs


def _of_stage(key: str, value: Any, stage: int, stages: int) -> Any:
    """An argument that is one value for all stages or a list with one per stage; the step checks its type."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != stages:
        raise PlanError(f"{label(key, arg=True)} holds {len(value)} values", expected=f"{stages}, one for each stage")
    return value[stage]
