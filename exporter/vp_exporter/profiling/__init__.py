"""Profile a bundle with the engine's own profiler, by parts of the model."""
