"""Streams, events and graphs of the simulated GPUs, whose operations are all done when they return."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from acb.hooks.torch.patching import Patches
from acb.hooks.torch.simulated import places
from acb.hooks.torch.simulated.ledger import Ledger


class Stream:
    """A stream of one GPU, as in CUDA; 0 is the default one."""

    _made = 0
    device_index: int
    device_type = 1
    priority: int

    def __new__(
        cls,
        device: Any = None,
        priority: int = 0,
        stream_id: int | None = None,
        device_index: int | None = None,
        **kwargs: Any,
    ) -> Stream:
        index = places.ordinal(device if device_index is None else device_index)
        torch.cuda._lazy_init()
        self = super().__new__(cls)
        self.device_index = max(0, index)
        if stream_id is None:
            Stream._made += 1
            stream_id = Stream._made
        self.stream_id = self.cuda_stream = stream_id
        self.priority = priority
        return self

    stream_id: int
    cuda_stream: int

    @property
    def device(self) -> Any:
        """Whose stream it is."""
        return places.CUDA[self.device_index]

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The least and the greatest priority."""
        return 0, -1

    def wait_event(self, event: Any) -> None:
        """Make all future work on this stream wait for an event."""

    def wait_stream(self, stream: Any) -> None:
        """Synchronize with another stream."""

    def record_event(self, event: Event | None = None) -> Event:
        """Record an event."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        """Check if all the work submitted has been completed."""
        return True

    def synchronize(self) -> None:
        """Wait for all the kernels in this stream to complete."""

    def is_capturing(self) -> bool:
        """Whether a graph is being captured: never."""
        return False

    def __enter__(self) -> Stream:
        _current.enter(self)
        return self

    def __exit__(self, *error: object) -> None:
        _current.leave()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Stream) and other.stream_id == self.stream_id and other.device_index == self.device_index
        )

    def __hash__(self) -> int:
        return hash((self.stream_id, self.device_index))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device={self.device} cuda_stream={self.cuda_stream:#x}>"


class ExternalStream(Stream):
    """A stream that somebody else has made."""

    def __new__(cls, stream_ptr: int, device: Any = None, **kwargs: Any) -> ExternalStream:
        self: Any = super().__new__(cls, device, stream_id=stream_ptr)
        return self  # type: ignore[no-any-return]


class Event:
    """A moment in a stream."""

    device: Any = None

    def __new__(
        cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
    ) -> Event:
        torch.cuda._lazy_init()
        self = super().__new__(cls)
        self.enable_timing = enable_timing
        self._at = None
        return self

    enable_timing: bool
    _at: float | None

    def record(self, stream: Any = None) -> None:
        """Record the event in a given stream."""
        self.device = (current_stream() if stream is None else stream).device
        self._at = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Make all future work submitted to the given stream wait for this event."""

    def query(self) -> bool:
        """Check if all work currently captured by event has completed."""
        return True

    def elapsed_time(self, end_event: Event) -> float:
        """The time in milliseconds between this event and `end_event`."""
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._at is None or end_event._at is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end_event._at - self._at) * 1000

    def synchronize(self) -> None:
        """Wait for the event to complete."""

    def ipc_handle(self) -> None:
        """Not simulated."""
        raise RuntimeError("the simulated GPU cannot share events between processes")

    def __repr__(self) -> str:
        return "<torch.cuda.Event>" if self._at is not None else "<torch.cuda.Event uninitialized>"


class _Current(threading.local):
    """The streams that this thread has chosen, by the GPU's index, and what to go back to."""

    def __init__(self) -> None:
        self.streams: dict[int, Stream | None] = {}
        self._before: list[tuple[int, int, Stream | None]] = []

    def enter(self, stream: Stream) -> None:
        """Choose a stream, and its GPU, for now."""
        index = stream.device_index
        self._before.append((places.choose(index), index, self.streams.get(index)))
        self.streams[index] = stream

    def leave(self) -> None:
        """Go back to what was chosen before."""
        current, index, stream = self._before.pop()
        self.streams[index] = stream
        places.choose(current)


_current = _Current()


class StreamContext:
    """``with torch.cuda.stream(s)``."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            _current.enter(self.stream)

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            _current.leave()


def current_stream(device: Any = None) -> Stream:
    """Return the currently selected stream."""
    index = places.ordinal(device)
    return _current.streams.get(index) or Stream(device_index=index, stream_id=0)


def default_stream(device: Any = None) -> Stream:
    """Return the default stream."""
    return Stream(device, stream_id=0)


def set_stream(stream: Stream | None) -> None:
    """Set the current stream."""
    if stream is not None:
        places.choose(stream.device_index)
        _current.streams[stream.device_index] = stream


def _no_graphs(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("CUDA graphs are not simulated: run the program without them, or on a real GPU")


def make_graphed_callables(*args: Any, **kwargs: Any) -> Any:
    """Not simulated."""
    _no_graphs()


def graph_pool_handle() -> Any:
    """Not simulated."""
    _no_graphs()


def is_current_stream_capturing() -> bool:
    """Whether a graph is being captured: never."""
    return False


class CUDAGraph:
    """Not simulated."""

    def __new__(cls, *args: Any, **kwargs: Any) -> CUDAGraph:
        _no_graphs()
        return super().__new__(cls)

    capture_begin = capture_end = instantiate = replay = reset = pool = debug_dump = enable_debug_mode = _no_graphs


def patch_streams(patches: Patches, ledger: Ledger) -> None:
    """torch.cuda.Stream, Event and the functions around them."""
    import torch.cuda.streams as streams

    for kind in (Stream, ExternalStream, Event):
        patches.set(torch.cuda, kind.__name__, kind)
        patches.set(streams, kind.__name__, kind)
    patches.set(torch.cuda, "StreamContext", StreamContext)
    for function in (current_stream, default_stream, set_stream):
        patches.set(torch.cuda, function.__name__, function)
    patches.set(torch.cuda, "stream", lambda stream: StreamContext(stream))
    patches.set(torch.cuda, "get_stream_from_external", lambda data_ptr, device=None: ExternalStream(data_ptr, device))


def patch_graphs(patches: Patches, ledger: Ledger) -> None:
    """CUDA graphs: refused in words."""
    import torch.cuda.graphs as graphs

    for module in (torch.cuda, graphs):
        patches.set(module, "CUDAGraph", CUDAGraph)
        patches.set(module, "make_graphed_callables", make_graphed_callables)
        patches.set(module, "graph_pool_handle", graph_pool_handle)
        patches.set(module, "is_current_stream_capturing", is_current_stream_capturing)
    patches.set(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False)
    patches.set(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


STEPS = (patch_streams, patch_graphs)
