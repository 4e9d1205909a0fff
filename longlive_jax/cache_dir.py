"""The persistent compilation cache, in the folder where the user's system keeps caches."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Mapping

# What JAX says of every program that it cannot write into the cache.
FAILED = "Error writing persistent compilation cache entry"


def failure(message: str) -> str:
    """A sentence in the place of JAX's warning, for all programs."""
    reason = message.rpartition(": ")[2] or message
    return f"compiled programs are not kept for the next start: {reason}"


def user_cache(
    environment: Mapping[str, str] = os.environ, platform: str = sys.platform
) -> pathlib.Path:
    """The folder for this package's caches: XDG on Linux, its counterparts on macOS and Windows."""
    home = pathlib.Path.home()
    fallback = {
        "darwin": home / "Library" / "Caches",
        "win32": home / "AppData" / "Local",
    }.get(platform, home / ".cache")
    chosen = pathlib.Path(environment.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    return (chosen if chosen.is_absolute() else fallback) / "longlive-jax"


def enable(folder: pathlib.Path | None = None) -> pathlib.Path | None:
    """Keeps every compiled program on disk, so that a second start loads instead of compiling.

    A cache that the user configured through JAX itself is left alone. Small programs count too:
    there are many, and JAX would by default keep only those that took a second to compile.

    Args:
      folder: Where to keep them; None is `user_cache() / "xla"`.

    Returns:
      The folder in use, or None where it cannot be written: then nothing is cached.
    """
    import jax

    configured = jax.config.jax_compilation_cache_dir
    if configured:
        return pathlib.Path(configured)
    folder = folder or user_cache() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder
