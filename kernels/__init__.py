"""Kernels for the hot ops of `longlive_jax`; see README.md for what exists and where it was run."""
