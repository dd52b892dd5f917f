"""The papers' claims on public data: the parts of `python -m benchmarks.replicate`."""
