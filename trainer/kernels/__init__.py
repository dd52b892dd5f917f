"""Fused kernels in Triton, each with its plain reference beside it.

A kernel runs on CUDA tensors; everywhere else its reference does, which is also what
tests and benchmarks hold it against (`trainer.kernels.case`).
"""
