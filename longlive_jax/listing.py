"""The entries of a folder, without what operating systems and file servers leave in it."""

from __future__ import annotations

import fnmatch
import pathlib

# In lower case: Windows' thumbnails and settings; folders of archives made by macOS, of NAS
# systems, and of removed files. Names that begin with a dot are hidden in any case: .DS_Store, and
# the ._name that macOS writes beside a file on disks that are not its own.
_LEFT_BEHIND = frozenset(
    {
        *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"),
        *("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"),
        "lost+found",
    }
)


def is_hidden(name: str) -> bool:
    """Return whether a name is that of a hidden file, or of one that a system has left behind."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def shown(folder: pathlib.Path, pattern: str = "*") -> list[pathlib.Path]:
    """Return the entries of a folder by name, without hidden ones.

    Args:
      folder: Where to look; not in the folders within it.
      pattern: Of the names, in the case that they are written in.

    Raises:
      OSError: the folder cannot be read.
    """
    return sorted(
        path
        for path in folder.iterdir()
        if not is_hidden(path.name) and fnmatch.fnmatchcase(path.name, pattern)
    )
