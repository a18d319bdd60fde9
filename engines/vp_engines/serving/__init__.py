"""Bundles behind a server: a model repository for Triton Inference Server."""
