"""vp::merge_rows: weighted means of tokens, given index lists."""
