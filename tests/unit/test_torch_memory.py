"""What PyTorch's evacuator asks of the driver and of the allocator: page-locking, and which stream owns what."""

from __future__ import annotations

import ctypes
import gc
import mmap
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torch")

from acb.hooks.torch import pagelocks, streams
from acb.hooks.torch.pagelocks import INVALID_CONTEXT, PORTABLE, Driver
from acb.hooks.torch.streams import DEFAULT, Owners


class Call:
    """A driver call that answers as it is told, and then with 0."""

    def __init__(self, *answers: int) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[int, ...]] = []
        self.argtypes: list[Any] = []

    def __call__(self, *arguments: int) -> int:
        for kind, value in zip(self.argtypes, arguments, strict=True):
            kind(value)
        self.calls.append(arguments)
        return self.answers.pop(0) if self.answers else 0


def driver(register: Call, unregister: Call, enter: Callable[[], Any] = lambda: None) -> Driver:
    return Driver(SimpleNamespace(cuMemHostRegister_v2=register, cuMemHostUnregister=unregister), enter)


def test_memory_is_page_locked_for_every_gpu() -> None:
    register, unregister = Call(), Call()
    locks = driver(register, unregister)
    assert locks.register(1 << 40, 1 << 33) == 0
    assert register.calls == [(1 << 40, 1 << 33, PORTABLE)]
    assert locks.unregister(1 << 40) == 0
    assert unregister.calls == [(1 << 40,)]


def test_a_thread_that_has_used_no_gpu_gets_a_context_first() -> None:
    entered: list[None] = []
    register = Call(INVALID_CONTEXT)
    assert driver(register, Call(), lambda: entered.append(None)).register(4096, 4096) == 0
    assert len(register.calls) == 2
    assert len(entered) == 1


@pytest.mark.parametrize("code", [1, 2, 712, 801])  # invalid value, no more may be locked, registered already, …
def test_a_refusal_is_passed_on(code: int) -> None:
    assert driver(Call(code), Call()).register(4096, 4096) == code


def test_without_a_driver_nothing_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert pagelocks.page_locking() == ()


def test_pages_are_made_and_zero() -> None:
    with mmap.mmap(-1, 150 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory[5] = 7
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        pagelocks.make_pages([(address, 130 << 20), (address + (140 << 20), 10 << 20)])
        assert memory[5] == 7
        assert _resident(address, 150 << 20) >= 140 << 20
        assert not any(memory[6 : 150 << 20 : 4096])
        gc.collect()  # the address's array looks at the map


def test_pages_that_cannot_be_made_are_left_to_their_first_use() -> None:
    pagelocks.make_pages([(1 << 46, 200 << 20)])  # nothing is there
    pagelocks.make_pages([])


def _resident(address: int, nbytes: int) -> int:
    """Bytes of a map that have pages, as the kernel says; maps side by side may be one to it."""
    ours = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if "-" in name:
            begin, end = (int(part, 16) for part in name.split("-"))
            ours = begin <= address and address + nbytes <= end
        elif ours and name == "Rss:":
            return int(line.split()[1]) << 10
    raise AssertionError("no such map")


def segment(address: int, nbytes: int, stream: int) -> dict[str, int]:
    return {"address": address, "total_size": nbytes, "stream": stream, "device": 0}


@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 3)), max_size=6),
    address=st.integers(0, 120),
)
def test_memory_belongs_to_the_stream_of_its_segment(lengths: list[tuple[int, int, int]], address: int) -> None:
    segments, begin = [], 3
    for nbytes, gap, stream in lengths:
        segments.append(segment(begin, nbytes, stream))
        begin += nbytes + gap
    inside = [s["stream"] for s in segments if s["address"] <= address < s["address"] + s["total_size"]]
    assert Owners(reversed(segments)).of(address) == (inside[0] if inside else DEFAULT)


def test_where_the_allocator_tells_nothing_all_is_the_default_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> Any:
        raise RuntimeError("no snapshot of this allocator")

    monkeypatch.setattr(streams.cuda, "memory_snapshot", broken)
    assert streams.owners().of(4096) == DEFAULT


def test_older_allocators_tell_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams.cuda, "memory_snapshot", lambda: [segment(4096, 8192, 7)])
    assert streams.owners().of(8000) == 7
