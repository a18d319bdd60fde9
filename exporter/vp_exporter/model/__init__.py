"""The timm model: which ones we take, from a name or from a file of weights, and how its images are prepared."""
