"""Whether a directory can take a file, found out by writing one that has no name and is gone at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def obstacle(directory: Path, nbytes: int) -> str:
    """Why no file of `nbytes` can be written in `directory`, which need not be there yet; '': one can.

    Tried, not asked for: modes mean nothing to root, and a full disk, a quota and a read-only mount have no modes.
    """
    place = directory
    while not os.path.lexists(place):  # where the directory would be made
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(nbytes))
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""
