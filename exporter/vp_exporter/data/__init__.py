"""Image folders and class names."""
