"""torch operator vp::density_merge (BAT's step between attention and MLP): argument checks and registration."""

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
    """Reduce each image to `tokens_out` tokens: merge pairs of attentive tokens, and cluster the inattentive ones.

    Source: Long et al., CVPR 2023, as described in docs/reducers.md (bat).

    Args:
        x: [B, N, D], contiguous, float32, float16 or bfloat16; N up to 1024.
        scores: float32 [B, N], contiguous: attention of the class token; prefix columns are included but ignored.
        size: float32 [B, N], contiguous, number of patches in each token; None for 1 each.
        tokens_out: Number of output tokens, prefix included: prefix + 1 .. N - pairs.
        clusters: K, number of tokens that replace the inattentive ones; 0 only if there are none.
        pairs: Merges among the n_a = tokens_out - prefix - clusters + pairs attentive tokens, up to n_a // 2.
        prefix: Number of leading tokens that are left alone.
        weights: Weight means by "attention" (the scores, at least 1e-12) or by "size".

    Returns:
        x' [B, tokens_out, D], dtype of x: the prefix; the unmerged attentive tokens at even positions, ascending, then
        all at odd positions (without pairs: all attentive tokens, ascending); the clusters, by position of their
        centre. size' float32 [B, tokens_out], summed sizes.

    Raises:
        KernelError: if an argument has an unsupported device, dtype, shape, stride or count.

    Examples:
        >>> import torch
        >>> from vp_kernels.ops import density_merge
        >>> x, scores = torch.randn(2, 17, 64), torch.rand(2, 17)
        >>> merged, size = density_merge(x, scores, None, tokens_out=10, clusters=3, pairs=2, prefix=1)
        >>> merged.shape, size.sum(1)
        (torch.Size([2, 10, 64]), tensor([17., 17.]))
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
    """Check the arguments by their shapes, without reading data.

    Raises:
        KernelError: naming the argument, its value and what is allowed.
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
