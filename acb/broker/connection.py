"""The broker's end of one connection: what a peer has no room for is kept until it reads on.

A program that is stopped, by Ctrl-Z say, reads nothing for hours, and keeps its lease and its memory meanwhile. Each
time that somebody comes and waits for its GPU, or gives up, it is told so; of all that only the last counts.
"""

from __future__ import annotations

import select
import socket
from collections import deque

from acb.broker.log import log
from acb.protocol import Message, Ping, ProtocolError, Revoke, Status, Uncontended, encode

MOST_UNSENT = 64
"""Messages that are kept for a peer: more than the broker has to say to one that does not answer."""

_REPLACED: dict[type[Message], tuple[type[Message], ...]] = {
    Revoke: (Revoke, Uncontended),
    Uncontended: (Revoke, Uncontended),
    Ping: (Ping,),
}
"""By type of message, those before it that need not be said any more."""


class Connection:
    """One peer: a client, or somebody at the command line. Its socket is known to `poller`, for what it says."""

    def __init__(self, number: int, accepted: socket.socket, pid: int, poller: select.epoll) -> None:
        self.id = number
        self.socket = accepted
        self.pid = pid
        self._poller = poller
        self._unsent: deque[Message] = deque()
        self._blocked = False  # whether the poller is to tell when the peer has room
        poller.register(accepted, select.EPOLLIN)

    def send(self, message: Message) -> bool:
        """Send, or keep it until the peer has read what was before; False: too much waits for it, and this is lost."""
        if self._unsent:
            replaced = _REPLACED.get(type(message), ())
            self._unsent = deque(before for before in self._unsent if not isinstance(before, replaced))
            if len(self._unsent) >= MOST_UNSENT or isinstance(message, Status):  # large, and can be asked for again
                return False
        self._unsent.append(message)
        self.flush()
        return True

    def flush(self) -> None:
        """Send what was kept, as far as the peer has room; the poller tells when it has more."""
        while self._unsent and self._sent(self._unsent[0]):
            self._unsent.popleft()
        if bool(self._unsent) != self._blocked:
            self._blocked = not self._blocked
            self._poller.modify(self.socket, select.EPOLLIN | (select.EPOLLOUT if self._blocked else 0))

    def _sent(self, message: Message) -> bool:
        try:
            self.socket.send(encode(message))
        except BlockingIOError:
            return False
        except ProtocolError as error:
            log(f"process {self.pid} is not answered: {error}")
        except OSError:
            pass  # it is dead, which reading will show
        return True
