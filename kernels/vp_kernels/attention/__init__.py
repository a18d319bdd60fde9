"""vp::attention: fused attention that also returns how much attention each key receives."""
