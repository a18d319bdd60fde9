"""Triton kernels for token reduction, each with a reference in plain torch."""
