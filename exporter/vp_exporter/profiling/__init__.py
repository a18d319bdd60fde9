"""Where a bundle's time goes: the engine's own profiler, by parts of the model."""
