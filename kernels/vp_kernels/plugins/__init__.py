"""TensorRT plugins of the operators: C++ in src/, with kernels compiled ahead of time inside (docs/plugins.md)."""
