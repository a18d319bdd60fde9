"""V-Pruner's stages: the search for a static mask."""
