"""What broker and clients say to each other: one JSON object a packet of a Unix SOCK_SEQPACKET socket. No I/O here.

A packet is ``{"type": NAME, ...fields}``. Unknown fields are ignored, so that a newer peer can say more; unknown types,
missing fields and wrong field types are refused with ProtocolError. All sizes are in bytes, all times in seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

VERSION = 1
"""Of the wire. Peers of different versions do not talk: the hello is refused with both versions named."""

MAX_PACKET = 64 * 1024
"""Bytes. A longer packet is refused."""

REMEMBERED, REMEMBERED_SIZE = 256, 512
"""So many messages, of at most so many bytes, are not converted anew each time that they come up."""


class ProtocolError(Exception):
    """A packet that cannot be understood; says why."""


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages; `type` is its name on the wire."""

    type: ClassVar[str] = ""


# --- from a client ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """The first packet of a client. After a broker's death it also tells the next one what the client holds.

    `count` GPUs at once are asked for (0: not said, which is one). A process that is one of `gang_size` which only run
    together, each on a GPU of its own, names its `gang`, and its `rank` in it from 0; if it says a count, too, that has
    to be the gang's size. `gpu` is the ordinal of the GPU that the client is bound to,
    -1: none yet; of a client of several, the first, and `gpus` has all, as in Grant. Sizes are bytes on one GPU; of a
    client of several GPUs, on the fullest. What is learned is kept by `program`, else by the name: two programs of one
    file name need not be alike. `arguments` is a digest of the command line's, on which the need of memory may depend.
    `chosen`: the user has said which GPU, and it is to be no other. `pool`: the folder of the GPUs that the process
    uses, if they are simulated, and `pool_gpus` what they are, as after --simulate-gpus.
    """

    type: ClassVar[str] = "hello"
    version: int
    pid: int
    name: str
    memory_hint: int = 0
    gpu: int = -1
    holding: bool = False
    resident: int = 0
    evacuated: int = 0
    peak: int = 0
    priority: int = 0
    weight: float = 1.0
    count: int = 0
    gpus: str = ""
    gang: str = ""
    gang_size: int = 0
    rank: int = 0
    program: str = ""
    arguments: str = ""
    chosen: bool = False
    pool: str = ""
    pool_gpus: str = ""


@dataclass(frozen=True, slots=True)
class Request(Message):
    """The client wants a lease and waits; `need` is what it asks for beyond what is known (0: nothing special)."""

    type: ClassVar[str] = "request"
    need: int = 0


@dataclass(frozen=True, slots=True)
class Yield(Message):
    """The client gives its lease back; `resident` bytes of it still lie on the GPU.

    `peak` is the most it held under this lease; `wants` says that a thread already waits for the next lease. `phase` is
    how long, in seconds, the last run of regions was, with no long gap in it; -1: not known.
    """

    type: ClassVar[str] = "yield"
    resident: int
    peak: int = 0
    wants: bool = False
    cause: str = ""
    phase: float = -1.0


@dataclass(frozen=True, slots=True)
class Evacuated(Message):
    """Answer to Evacuate: `resident` bytes are left on the GPU, `moved` are in host memory, after `seconds`.

    With `more`, one piece is gone, and others follow; `moved` and `seconds` are each piece's own. A refusal has a
    `reason`; the client then keeps what it still has (the hold tier).
    """

    type: ClassVar[str] = "evacuated"
    resident: int
    moved: int = 0
    seconds: float = 0.0
    reason: str = ""
    more: bool = False


@dataclass(frozen=True, slots=True)
class Restored(Message):
    """The client has brought `moved` bytes back in `seconds` and runs."""

    type: ClassVar[str] = "restored"
    resident: int
    moved: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Holds(Message):
    """A client that has the lease holds `resident` bytes, and has held `peak` at most: said now and then, and at its
    end."""

    type: ClassVar[str] = "holds"
    resident: int
    peak: int


@dataclass(frozen=True, slots=True)
class MoreRoom(Message):
    """A running client came short: it holds `resident` and wants `nbytes` more."""

    type: ClassVar[str] = "more_room"
    resident: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Pong(Message):
    """Answer to Ping: the agent's thread can run."""

    type: ClassVar[str] = "pong"


# --- from the command line ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskStatus(Message):
    """What the broker sees; answered with one Status. To hear of all clients, ask again for those `after` the last."""

    type: ClassVar[str] = "ask_status"
    after: int = 0


@dataclass(frozen=True, slots=True)
class AskStop(Message):
    """End the broker; answered with Goodbye."""

    type: ClassVar[str] = "ask_stop"


# --- from the broker ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Answer to Hello. Without `lease`, a client that said it holds one must stop at its gate and ask again.

    `stranded`: why the client's requests will wait until there is another broker, in a sentence for a person.
    """

    type: ClassVar[str] = "welcome"
    version: int
    client: int
    lease: bool = False
    stranded: str = ""


@dataclass(frozen=True, slots=True)
class Grant(Message):
    """The lease of GPU `gpu` (of the name `visible` to CUDA_VISIBLE_DEVICES), with room for `headroom` bytes in all.

    `gpus`: the ordinals, separated by commas, of all GPUs that the process is to see, in the order of `visible`, when
    they are more than one: those of a client of several GPUs, or of its gang. `coming`: so many bytes more of headroom
    follow, with Headroom; until then the client may bring its memory back, as far as there is room, but not run.
    `beside`: bytes of others' memory on the GPU that could make way, should the headroom not be enough.
    """

    type: ClassVar[str] = "grant"
    gpu: int
    visible: str
    headroom: int
    gpus: str = ""
    coming: int = 0
    beside: int = 0


@dataclass(frozen=True, slots=True)
class Headroom(Message):
    """More of the room that was `coming` with a Grant is there: `headroom` bytes in all, and so many still `coming`."""

    type: ClassVar[str] = "headroom"
    headroom: int
    coming: int = 0


@dataclass(frozen=True, slots=True)
class Revoke(Message):
    """Another client waits: yield when idle, and after `quantum` seconds from now at the next safe point.

    `swap`: what yielding will cost the client, in seconds of moving memory out and in again, as far as the broker
    knows; -1: it does not. It may be sent again with other values, which then hold.
    """

    type: ClassVar[str] = "revoke"
    quantum: float
    swap: float = -1.0


@dataclass(frozen=True, slots=True)
class Evacuate(Message):
    """Move the memory of this client, which holds no lease, to host memory; answered with Evacuated.

    `piece`: somebody waits to bring his own memory back: say so whenever about so many bytes are free; 0: only at the
    end.
    """

    type: ClassVar[str] = "evacuate"
    piece: int = 0


@dataclass(frozen=True, slots=True)
class Uncontended(Message):
    """Nobody waits any more: a Revoke that was not yet obeyed is withdrawn."""

    type: ClassVar[str] = "uncontended"


@dataclass(frozen=True, slots=True)
class Ping(Message):
    """Are you there? Asked of a client whose memory the driver has moved, and that does not ask for its lease."""

    type: ClassVar[str] = "ping"


@dataclass(frozen=True, slots=True)
class Room(Message):
    """Answer to MoreRoom."""

    type: ClassVar[str] = "room"
    granted: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """A hello or request that cannot be served; `reason` is one sentence for a person."""

    type: ClassVar[str] = "refused"
    reason: str


@dataclass(frozen=True, slots=True)
class Status(Message):
    """Answer to AskStatus: `report` with the first, as many `clients`, by id, as fit, and whether there are `more`."""

    type: ClassVar[str] = "status"
    report: dict[str, Any] = field(default_factory=dict)
    clients: list[dict[str, Any]] = field(default_factory=list)
    more: bool = False


@dataclass(frozen=True, slots=True)
class Goodbye(Message):
    """The broker ends on purpose."""

    type: ClassVar[str] = "goodbye"
    pid: int = 0


_MessageT = TypeVar("_MessageT", bound=Message)
_TYPES: dict[str, type[Message]] = {
    cls.type: cls
    for cls in (
        Hello, Request, Yield, Evacuated, Restored, Holds, MoreRoom, Pong, AskStatus, AskStop,
        Welcome, Grant, Headroom, Revoke, Evacuate, Uncontended, Ping, Room, Refused, Status, Goodbye,
    )
}  # fmt: skip
_INT_MAX = 1 << 62


def _accepted(hint: Any) -> tuple[type, ...]:
    """The Python types that a field of this annotation takes from JSON."""
    origin = get_origin(hint) or hint
    assert isinstance(origin, type), (hint, get_args(hint))
    return (int, float) if origin is float else (origin,)


_SCHEMAS: dict[str, list[tuple[str, tuple[type, ...], bool]]] = {
    name: [
        (f.name, _accepted(get_type_hints(cls)[f.name]), f.default is MISSING and f.default_factory is MISSING)
        for f in fields(cls)
    ]
    for name, cls in _TYPES.items()
}


_parse = json.JSONDecoder().decode
_compact = json.JSONEncoder(separators=(",", ":")).encode
_WRITE: dict[type, Callable[[Any], str]] = {
    int: repr,
    float: repr,
    str: encode_basestring_ascii,
    bool: lambda value: "true" if value else "false",
}


def _template(name: str) -> tuple[str, list[tuple[str, Callable[[Any], str]]]]:
    """The packet of a type with holes, and how each is filled: a third of json.dumps' time; hand-overs wait for it."""
    fills = [(field_name, _WRITE.get(accepted[-1], _compact)) for field_name, accepted, _ in _SCHEMAS[name]]
    holes = "".join(f',"{field_name}":%s' for field_name, _ in fills)
    return f'{{"type":"{name}"{holes}}}', fills


_TEMPLATES = {name: _template(name) for name in _TYPES}


def encode(message: Message) -> bytes:
    """The packet of a message. Raises ProtocolError when it is longer than MAX_PACKET."""
    return _encode(message) if isinstance(message, Status) else _encode_again(message)


def decode(packet: bytes) -> Message:
    """The message in a packet. Raises ProtocolError when it is not one."""
    return _decode(packet) if len(packet) > REMEMBERED_SIZE else _decode_again(packet)


def _encode(message: Message) -> bytes:
    template, fills = _TEMPLATES[message.type]
    packet = (template % tuple([write(getattr(message, name)) for name, write in fills])).encode()
    if len(packet) > MAX_PACKET:
        raise ProtocolError(f"a {message.type} message of {len(packet)} bytes is longer than {MAX_PACKET}")
    return packet


def _decode(packet: bytes) -> Message:
    if len(packet) > MAX_PACKET:
        raise ProtocolError(f"a packet of {len(packet)} bytes is longer than {MAX_PACKET}")
    try:
        body = _parse(packet.decode())
    except (ValueError, RecursionError):
        raise ProtocolError(f"not JSON: {packet[:40]!r}") from None
    name = body.get("type") if isinstance(body, dict) else None
    if not isinstance(name, str) or name not in _SCHEMAS:
        raise ProtocolError(f"unknown message type {str(name)[:40]!r}")
    values = {}
    for key, accepted, required in _SCHEMAS[name]:
        if key not in body:
            if required:
                raise ProtocolError(f"a {name} message without {key!r}")
            continue
        value = body[key]
        kind = type(value)
        if kind not in accepted or ((kind is int or kind is float) and not -_INT_MAX < value < _INT_MAX):
            raise ProtocolError(f"a {name} message whose {key!r} is {str(value)[:40]!r}")
        values[key] = value
    return _TYPES[name](**values)


# A steady program says the same in every phase, and after a long phase it is not the instructions that cost, but
# fetching them: what takes 3 µs in a loop takes 80 µs once the caches hold other things, and 13 µs so.
_encode_again = lru_cache(REMEMBERED)(_encode)
_decode_again = lru_cache(REMEMBERED)(_decode)
