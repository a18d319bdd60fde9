"""vp::density_merge: BAT's step, decouple attentive tokens from others, pair the ones, cluster the others."""
