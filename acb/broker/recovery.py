"""Recovery: what becomes of the clients of the broker before this one, which may hold leases and memory still.

For a moment nothing is lent, until they have told what they hold. One that lives and has not told by then (it is
stopped, say, or a native call keeps the interpreter's lock) is *absent*: it enters the books as what the journal and
the device know of it, so that others get what it leaves, and no more. That ends when it speaks, or with its process,
however long it takes; so a person is told who it is, and what can be done. Nobody waits for who holds nothing, nor for
the dead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from acb import processes
from acb.broker.core import Broker
from acb.broker.journal import Journal, Place
from acb.broker.log import log
from acb.broker.state import Client, Found, Gpu, Send
from acb.config import format_size
from acb.protocol import VERSION, Hello

PATIENCE = 2.0
"""Seconds that a new broker lends nothing while it waits for the clients of the one before."""

EVERY, LATER = 0.05, 0.25
"""Seconds between two looks at who has died, while nothing is lent, and after that."""


class Recovery:
    """See the module. Times are time.monotonic()'s.

    `pool`: the folder of the GPUs, if they are simulated. `holds`: bytes that a process has on a GPU; None: the device
    does not say. `new_id`: the id of a client that has no connection. `driver`: whether the driver may have moved
    clients' memory.
    """

    def __init__(
        self,
        core: Broker,
        journal: Journal,
        pool: str,
        holds: Callable[[Gpu, int], int | None],
        new_id: Callable[[], int],
        *,
        driver: bool,
    ) -> None:
        self._core = core
        self._journal = journal
        self._pool = pool
        self._holds = holds
        self._new_id = new_id
        self._driver = driver
        self._unheard: dict[int, Client | None] = {}  # by process; a client, once it is absent
        self._until: float | None = None
        self._next = 0.0

    def begin(self, now: float) -> None:
        """See whom the broker before has left."""
        self._unheard = {pid: None for pid in self._journal.survivors() if self._journal.place(pid) is not None}
        awaited = {pid for pid in self._unheard if self._may_hold(pid)}
        if awaited:
            self._core.recover(awaited)
            self._until = now + PATIENCE

    def due(self) -> float | None:
        """When to look next; None: there is nobody to look at."""
        return self._next if self._unheard else None

    def look(self, now: float, deliver: Callable[[list[Send]], None], find: Callable[[int, int], None]) -> None:
        """Forget the dead; and give those up, after a while, that live and do not speak. Call it when it is due().

        `find`: have the driver asked what it has of the client of an id, a process.
        """
        self._next = now + (LATER if self._until is None else EVERY)
        for pid in [pid for pid in self._unheard if self._journal.ended(pid)]:
            absent = self._unheard.pop(pid)
            self._journal.went(pid)
            if absent is not None:
                log(f"process {pid} ({absent.name}) has ended, without a word")
                deliver(self._core.gone(absent.id, now))
            else:
                deliver(self._core.recovered({pid}, now))
        if self._until is not None and (not self._core.recovering or now >= self._until):
            self._until = None
            for pid in sorted(self._core.recovering):
                if self._may_hold(pid):
                    self._keep_for(pid, now, deliver, find)
                else:
                    deliver(self._core.recovered({pid}, now))

    def spoke(self, pid: int) -> None:
        """The process has said hello."""
        absent = self._unheard.pop(pid, None)
        if absent is not None:
            log(f"process {pid} ({absent.name}) has said now what it holds")

    def silent_holders(self) -> set[int]:
        """Processes that held a lease, and have not spoken."""
        return self._journal.holders & self._unheard.keys()

    # --- inside ------------------------------------------------------------------------------------------------------

    def _gpus(self, place: Place, visible: Sequence[str]) -> list[Gpu]:
        """The GPUs of these names; [] when not all that it needs are lent here."""
        lent = {gpu.visible: gpu for gpu in self._core.gpus}
        return [lent[name] for name in visible] if place.pool == self._pool and lent.keys() >= set(place.gpus) else []

    def _may_hold(self, pid: int) -> bool:
        """Whether it has a lease or memory here, as far as others than itself know."""
        place = self._journal.place(pid)
        own = self._gpus(place, place.own) if place is not None else []
        if not own:
            return False
        noted = pid in self._journal.holders or (self._driver and self._journal.suspended(pid) is not None)
        return noted or any(self._holds(gpu, pid) != 0 for gpu in own)

    def _keep_for(
        self, pid: int, now: float, deliver: Callable[[list[Send]], None], find: Callable[[int, int], None]
    ) -> None:
        """Keep for an absent process what it may hold."""
        place = self._journal.place(pid)
        assert place is not None
        gpus, own = self._gpus(place, place.gpus), self._gpus(place, place.own)
        sizes = [gpu.capacity if nbytes is None else nbytes for gpu in own for nbytes in [self._holds(gpu, pid)]]
        kept = self._journal.suspended(pid)
        hello = Hello(
            VERSION,
            pid,
            place.name,
            gpu=own[0].ordinal,
            gpus=",".join(str(gpu.ordinal) for gpu in gpus) if len(gpus) > 1 else "",
            holding=pid in self._journal.holders and kept is None,
            resident=max(sizes),
            count=0 if place.gang else len(gpus),
            gang=place.gang,
            gang_size=len(gpus) if place.gang else 0,
            rank=place.rank,
        )
        found = Found(kept.nbytes, kept.target) if kept is not None and self._driver else None
        number = self._new_id()
        deliver(self._core.absent(number, hello, now, found))
        self._unheard[pid] = client = self._core.clients[number]
        log(words(client))
        if found is not None and self._core.in_doubt(number):
            find(number, pid)


def words(client: Client) -> str:
    """Of an absent client: who is waited for, what that keeps from others, and what ends it."""
    which = "GPU " + " and ".join(str(gpu.ordinal) for gpu in client.gpus)
    what = f"{which} is lent to nobody else"
    if not client.lease:
        what = f"the {format_size(client.resident)} that it has on {which} are lent to nobody else"
    help_it = f"it may be busy; else end it with: kill -9 {client.pid}"
    if processes.stopped(client.pid):
        help_it = f"it is stopped: {processes.going_on(client.pid)}"
    return (
        f"process {client.pid} ({client.name}) has not told this broker what it holds since the one before; until it "
        f"does, or ends, {what}; {help_it}"
    )
