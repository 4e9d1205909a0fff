"""Attention whose keys are chosen by a table."""
