"""Rewrite a timm ViT to run a plan."""
