"""timm models: supported architectures, loading by name or from weights, and preprocessing."""
