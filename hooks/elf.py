"""Which libraries a shared object is linked against, read from the file: nothing is loaded, nothing run."""

from __future__ import annotations

import struct
from typing import BinaryIO

_DYNAMIC, _LOAD = 2, 1
_NEEDED, _STRINGS = 1, 5
_LONGEST = 256


def needed(path: str) -> list[str]:
    """The names (DT_NEEDED) that the file asks the loader for; [] for what is no 64-bit little-endian ELF file.

    The layout is that of the ELF-64 object file format, version 1.5. Raises OSError if the file cannot be read, and
    struct.error or ValueError if it is cut short.
    """
    with open(path, "rb") as file:
        header = file.read(64)
        if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:
            return []
        at, size, count = *struct.unpack_from("<Q", header, 32), *struct.unpack_from("<HH", header, 54)
        table = _read(file, at, size * count)
        segments = [struct.unpack_from("<IIQQQQQQ", table, i * size) for i in range(count)]
        for kind, _, offset, _, _, length, _, _ in segments:
            if kind == _DYNAMIC:
                entries = list(struct.iter_unpack("<qQ", _read(file, offset, length)))
                break
        else:
            return []
        strings = next(value for tag, value in entries if tag == _STRINGS)
        base = next(
            strings - address + offset
            for kind, _, offset, address, _, length, _, _ in segments
            if kind == _LOAD and address <= strings < address + length
        )
        return [_string(file, base + value) for tag, value in entries if tag == _NEEDED]


def _read(file: BinaryIO, at: int, length: int) -> bytes:
    file.seek(at)
    found = file.read(length)
    if len(found) < length:
        raise ValueError(f"{file.name} is cut short")
    return found


def _string(file: BinaryIO, at: int) -> str:
    file.seek(at)
    return file.read(_LONGEST).partition(b"\0")[0].decode("utf-8", "replace")
