"""A benchmark with a pre-trained decoder: `python -m benchmarks.real`, described in docs/real.md."""
