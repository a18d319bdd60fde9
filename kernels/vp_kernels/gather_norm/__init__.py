"""vp::gather_norm: the kept rows, and their LayerNorm, in one pass."""
