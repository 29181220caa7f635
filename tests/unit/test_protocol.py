"""The wire's packets: every message comes back as it was, and whatever else comes is refused."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acb import protocol
from acb.protocol import (
    MAX_PACKET,
    Grant,
    Hello,
    Message,
    ProtocolError,
    Refused,
    Revoke,
    Status,
    Yield,
    decode,
    encode,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    int: st.integers(-(1 << 62) + 1, (1 << 62) - 1),
    float: st.floats(-1e15, 1e15),
    str: st.text(max_size=200),
    bool: st.booleans(),
    dict[str, Any]: st.dictionaries(st.text(max_size=5), json_values, max_size=4),
    list[dict[str, Any]]: st.lists(st.dictionaries(st.text(max_size=5), json_values, max_size=2), max_size=4),
}


def messages(kind: type[Message]) -> st.SearchStrategy[Message]:
    hints = get_type_hints(kind)
    return st.builds(kind, **{field.name: FIELDS[hints[field.name]] for field in fields(kind)})


any_message = st.sampled_from(list(protocol._TYPES.values())).flatmap(messages)


def attempt(packet: bytes) -> tuple[Message | None, str]:
    """The message in a packet, or why there is none."""
    try:
        return decode(packet), ""
    except ProtocolError as error:
        return None, str(error)


@given(any_message)
def test_every_message_comes_back(message: Message) -> None:
    packet = encode(message)
    assert decode(packet) == message
    assert type(decode(packet)) is type(message)
    assert len(packet) <= MAX_PACKET
    assert json.loads(packet)["type"] == message.type


@given(any_message, st.dictionaries(st.text(max_size=10), json_values, max_size=4))
def test_unknown_fields_are_ignored(message: Message, more: dict[str, Any]) -> None:
    body = json.loads(encode(message))
    assert decode(json.dumps({**more, **body}).encode()) == message


@given(any_message, st.data())
def test_missing_fields_are_refused_or_have_their_default(message: Message, data: st.DataObject) -> None:
    body = json.loads(encode(message))
    name = data.draw(st.sampled_from(sorted(body)))
    del body[name]
    again, said = attempt(json.dumps(body).encode())
    if again is None:
        assert name in said
    else:
        assert all(getattr(again, f.name) == getattr(message, f.name) for f in fields(message) if f.name != name)


@given(any_message, json_values, st.data())
def test_fields_of_other_types_are_refused(message: Message, value: Any, data: st.DataObject) -> None:
    body = json.loads(encode(message))
    name = data.draw(st.sampled_from(sorted(body)))
    body[name] = value
    again, _ = attempt(json.dumps(body).encode())
    if again is None:
        return
    if name == "type":
        assert again.type == value
    else:
        assert getattr(again, name) == value
        assert isinstance(getattr(message, name), (type(value), float))


@given(st.binary(max_size=300))
def test_noise_is_refused(packet: bytes) -> None:
    _, said = attempt(packet)
    assert "\n" not in said
    assert len(said) < 300


@given(json_values)
def test_other_json_is_refused(value: Any) -> None:
    with pytest.raises(ProtocolError):
        decode(json.dumps(value).encode())


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{", '"hello"', "NaN",
        '{"type":"hello"}', '{"type":5}', '{"type":null}', '{"type":"status","more":1}',
        '{"type":"revoke","quantum":NaN}', '{"type":"revoke","quantum":Infinity}', '{"type":"revoke","quantum":1e999}',
        '{"type":"revoke","quantum":"1"}', '{"type":"revoke","quantum":true}', '{"type":"yield","resident":1.0}',
        '{"type":"yield","resident":4611686018427387904}', '{"type":"yield","resident":' + "9" * 5000 + "}",
        "[" * 30_000, '{"type":"' + "x" * 60_000 + '"}',
    ],
)  # fmt: skip
def test_near_misses_are_refused_in_a_line(text: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(text.encode())
    assert "\n" not in str(caught.value)
    assert len(encode(Refused(str(caught.value)))) < 1000  # so it can be told to whoever sent it


def test_a_whole_number_is_a_time_too() -> None:
    assert decode(b'{"type":"revoke","quantum":1}') == Revoke(1.0)


def test_the_size_is_bounded() -> None:
    at_most = MAX_PACKET - len(encode(Refused("")))
    assert len(encode(Refused("x" * at_most))) == MAX_PACKET
    decode(encode(Refused("x" * at_most)))
    with pytest.raises(ProtocolError, match=str(MAX_PACKET)):
        encode(Refused("x" * (at_most + 1)))
    with pytest.raises(ProtocolError, match=str(MAX_PACKET)):
        encode(Status(clients=[{"name": "\N{SNOWMAN}" * 11_000}]))
    with pytest.raises(ProtocolError, match=str(MAX_PACKET)):
        decode(b" " * (MAX_PACKET + 1))


def test_odd_text_survives() -> None:
    for text in ('"\\\n\0\x7f', "\N{SNOWMAN}\N{GRINNING FACE}", "\ud800", "%s %d %%"):
        assert decode(encode(Hello(1, 1, text))) == Hello(1, 1, text)


def test_equal_looking_messages_are_told_apart() -> None:
    """Packets are remembered; 1, 1.0 and True are equal as keys of a dictionary."""
    for message in (
        Yield(1, 0, True),
        Yield(1, 1, False),
        Grant(1, "", 0),
        Revoke(1.0),
        Revoke(0.0),
        Yield(0, 1, True),
    ):
        assert repr(decode(encode(message))) == repr(message)
