"""vp::density_merge, BAT's step between attention and MLP: checks, registration, and the function that callers use."""

from __future__ import annotations

import torch
from torch import Tensor

from vp_kernels.checks import Check
from vp_kernels.density_merge import torch_form
from vp_kernels.launch import MAX_TOKENS, runs_kernel

OPERATOR = "vp::density_merge"
WEIGHTS = ("attention", "size")


def density_merge(
    x: Tensor,
    scores: Tensor,
    size: Tensor | None,
    tokens_out: int,
    clusters: int,
    pairs: int,
    prefix: int,
    weights: str = "attention",
) -> tuple[Tensor, Tensor]:
    """Leave `tokens_out` tokens of each image: attentive ones after `pairs` merges, and `clusters` of the inattentive.

    Source: Long et al., CVPR 2023, as docs/reducers.md (bat) has it.

    Args:
        x: [B, N, D], contiguous, float32, float16 or bfloat16; N up to 1024.
        scores: float32 [B, N], contiguous: the class token's attention, prefix columns included (and ignored).
        size: float32 [B, N], contiguous, patches that each token stands for; None for 1 each.
        tokens_out: tokens that leave, prefix included: prefix + 1 .. N - pairs.
        clusters: K, tokens that stand for the inattentive; 0 only where no token is inattentive.
        pairs: merges among the n_a = tokens_out - prefix - clusters + pairs attentive tokens, up to n_a // 2.
        prefix: tokens in front that take no part.
        weights: means weighted by "attention" (the scores, 1e-12 at least) or by "size".

    Returns:
        x' [B, tokens_out, D], dtype of x: the prefix; single attentive tokens of the even places ascending, then all of
        the odd places (without pairs: the attentive ascending); clusters by the place of their centre.
        size' float32 [B, tokens_out], sums.

    Raises:
        KernelError: an argument's device, dtype, shape, stride or count.
    """
    found: tuple[Tensor, Tensor] = torch.ops.vp.density_merge(
        x, scores, size, tokens_out, clusters, pairs, prefix, weights
    )
    return found


@torch.library.triton_op("vp::density_merge", mutates_args=())
def _density_merge(
    x: Tensor,
    scores: Tensor,
    size: Tensor | None,
    tokens_out: int,
    clusters: int,
    pairs: int,
    prefix: int,
    weights: str = "attention",
) -> tuple[Tensor, Tensor]:
    check(x, scores, size, tokens_out, clusters, pairs, prefix, weights)
    if runs_kernel(x):
        from vp_kernels.density_merge.kernel import launch_density_merge

        return launch_density_merge(x, scores, size, tokens_out, clusters, pairs, prefix, weights)
    return torch_form.density_merge(x, scores, size, tokens_out, clusters, pairs, prefix, weights)


def check(
    x: Tensor,
    scores: Tensor,
    size: Tensor | None,
    tokens_out: int,
    clusters: int,
    pairs: int,
    prefix: int,
    weights: str = "attention",
) -> None:
    """Refuse what the operator cannot run on: shapes only, no tensor's content.

    Raises:
        KernelError: naming the argument, what it is and what is allowed.
    """
    test = Check(OPERATOR, x)
    test.tensor("x", x, ("B", "N", "D"))
    batch, tokens, width = x.shape
    test.within("N of x", tokens, 1, MAX_TOKENS)
    test.true(width >= 1, "D of x", str(width), "1 or more")
    test.tensor("scores", scores, (batch, tokens), (torch.float32,))
    if size is not None:
        test.tensor("size", size, (batch, tokens), (torch.float32,))
    test.true(weights in WEIGHTS, "weights", repr(weights), " or ".join(map(repr, WEIGHTS)))
    test.within("prefix", prefix, 0, tokens - 1, "a patch token or more")
    test.within("pairs", pairs, 0, tokens, "tokens enter")
    why = f"{prefix} prefix and {tokens - prefix} patch tokens enter, {pairs} pairs merge"
    test.within("tokens_out", tokens_out, prefix + 1, tokens - pairs, why)
    patches_out = tokens_out - prefix
    test.within("clusters", clusters, 0, patches_out, f"tokens_out leaves room for {patches_out} patch tokens")
    attentive = patches_out - clusters + pairs
    test.within("pairs", pairs, 0, attentive // 2, f"{attentive} attentive tokens are matched")
    inattentive = tokens - prefix - attentive
    low = min(1, inattentive)
    test.within("clusters", clusters, low, inattentive, f"{inattentive} inattentive tokens are clustered")
