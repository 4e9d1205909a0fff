"""The parts of `gpu_check.py`, each a program of its own."""
