"""vp_exporter: a timm ViT and a token-reduction plan in, a checked engine bundle out."""
