"""A timm ViT rewritten to run a plan."""
