"""vp::select and vp::select_fuse: the highest scores, and one row of the others."""
