"""Bundles on Triton Inference Server: a model repository, and what runs in its Python backend."""
