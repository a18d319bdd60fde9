"""Python side of the TensorRT plugins in `kernels/plugins` (docs/plugins.md)."""
