"""What the broker has to say to one that does not read: kept, in order, and no more of it than counts."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from acb.broker.connection import MOST_UNSENT, Connection
from acb.protocol import Evacuate, Grant, Message, Ping, Revoke, Room, Status, Uncontended, decode


class Ends:
    """A connection, and the peer's end of it."""

    def __init__(self) -> None:
        accepted, self.peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        accepted.setblocking(False)
        self.peer.setblocking(False)
        self.poller = select.epoll()
        self.connection = Connection(1, accepted, 7, self.poller)

    def fill(self) -> None:
        """Send until the peer has no room."""
        while not self.connection._unsent:
            assert self.connection.send(Room(True))

    def wakes(self) -> bool:
        """Whether the poller says that the peer has room, and that is waited for."""
        return any(events & select.EPOLLOUT for _, events in self.poller.poll(0))

    def read_on(self) -> list[Message]:
        """What the peer reads, in turns with what is sent then; without what filled it."""
        said = []
        while True:
            try:
                said.append(decode(self.peer.recv(1 << 17)))
            except BlockingIOError:
                if not self.wakes():
                    return [message for message in said if message != Room(True)]
                self.connection.flush()


@pytest.fixture
def ends() -> Iterator[Ends]:
    found = Ends()
    yield found
    for end in (found.connection.socket, found.peer, found.poller):
        end.close()


def test_what_finds_no_room_comes_later_and_in_order(ends: Ends) -> None:
    ends.fill()
    assert not ends.wakes()
    for message in (Grant(0, "x", 5), Evacuate()):
        assert ends.connection.send(message)
    assert ends.read_on() == [Grant(0, "x", 5), Evacuate()]
    assert ends.connection.send(Evacuate(3))
    assert ends.read_on() == [Evacuate(3)]
    assert not ends.wakes(), "the broker would turn in circles"


def test_of_what_it_is_told_of_those_who_wait_only_the_last_counts(ends: Ends) -> None:
    ends.fill()
    for number in range(10 * MOST_UNSENT):
        assert ends.connection.send(Revoke(number))
        assert ends.connection.send(Ping())
        assert ends.connection.send(Uncontended())
    ends.connection.send(Grant(0, "x", 5))
    ends.connection.send(Revoke(3.0))
    assert ends.read_on() == [Ping(), Grant(0, "x", 5), Revoke(3.0)]


def test_no_more_is_kept_than_a_program_can_have_to_hear(ends: Ends) -> None:
    ends.fill()
    sent = [ends.connection.send(Room(False, str(number))) for number in range(2 * MOST_UNSENT)]
    assert sent[0]
    assert not sent[-1]
    assert not ends.connection.send(Status({}, []))
    assert ends.read_on() == [Room(False, str(number)) for number in range(sum(sent))]
