"""Matrices of the transformer in fewer bits."""
