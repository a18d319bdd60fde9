"""vp_kernels: Triton kernels for token reduction, each beside its reference."""
