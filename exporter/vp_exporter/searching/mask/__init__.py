"""V-Pruner's stages: search for a static mask."""
