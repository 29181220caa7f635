"""Moving regions of a video on the CPU: what differs from a running background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels of the frame: left and top are inside, right and bottom just outside."""

    left: int
    top: int
    right: int
    bottom: int


class MotionProposals:
    """Finds up to `limit` moving regions a frame, the largest first, of at least `smallest` of the frame's area."""

    def __init__(self, limit: int = 8, smallest: float = 0.001) -> None:
        self._limit = limit
        self._smallest = smallest
        self._background: Any = None

    def find(self, frame: NDArray[np.uint8]) -> list[Box]:
        """Return the moving regions of the next frame [height, width, 3]; none in the first."""
        grey = cv2.GaussianBlur(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY), (9, 9), 0).astype(np.float32)
        if self._background is None:
            self._background = grey
        difference = cv2.absdiff(grey, self._background)
        cv2.accumulateWeighted(grey, self._background, 0.15)
        moving = (difference > 18).astype(np.uint8)
        moving = cv2.dilate(cv2.morphologyEx(moving, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)), None, iterations=4)
        outlines, _ = cv2.findContours(moving, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        found = [(cv2.contourArea(outline), cv2.boundingRect(outline)) for outline in outlines]
        least = self._smallest * moving.size
        largest = sorted((entry for entry in found if entry[0] >= least), key=lambda e: (-e[0], e[1]))[: self._limit]
        return [Box(x, y, x + width, y + height) for _, (x, y, width, height) in largest]
