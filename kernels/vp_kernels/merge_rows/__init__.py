"""vp::merge_rows: weighted means of tokens, by index lists."""
