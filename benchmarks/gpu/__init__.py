"""GPU benchmarks and checks: `python -m benchmarks.gpu`."""
