"""What a GPU has to say of kernels and training steps: `python -m benchmarks.gpu PART`.

Owns every measurement that needs one. Does not own kernels and their cases
(`trainer.kernels`) or what is measured on CPUs (the modules of `benchmarks`).
"""
