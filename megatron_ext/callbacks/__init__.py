"""What may happen around a training step: logging, benchmarks, profiling."""
