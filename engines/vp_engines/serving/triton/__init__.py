"""Bundles on Triton Inference Server: writes the model repository; runs engines in the Python backend."""
