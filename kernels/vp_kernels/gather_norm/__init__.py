"""vp::gather_norm: gathers the kept rows and applies LayerNorm in one pass."""
