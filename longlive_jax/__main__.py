"""`python -m longlive_jax` is `longlive`."""

from longlive_jax.cli import main

main()
