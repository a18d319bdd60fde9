"""vp::attention: fused attention that also says how much attention every key received."""
