"""vp::select and vp::select_fuse: the highest scores, and optionally one token fused from the other rows."""
