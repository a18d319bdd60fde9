"""Serve bundles with Triton Inference Server or Ray Serve."""
