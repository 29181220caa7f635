"""Room: how much memory a client should have, who occupies what, and who has to make way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from acb.broker.learning import MARGIN
from acb.broker.policies import Policy
from acb.broker.state import Client, Gpu, Suspend
from acb.protocol import Evacuate, Message

STEADY = 3
"""So many leases in a row without a new peak, and a client's peak is believed to be the most it needs.

A program's first phases often only load its model. Room that is found short in the middle of a computation can hardly
be asked for then, so until the peak has settled the client gets the whole GPU; each surprise doubles that time.
"""

MAX_SURPRISES = 10
"""More make no difference: after a thousand steady leases anybody is believed."""

PIECES = 8
"""Into so many pieces a client's memory is divided when somebody else's comes in behind it: of the time that copying
out and then in would take, nine sixteenths are left."""

MIN_PIECE, MAX_PIECE = 64 << 20, 1 << 30
"""Bytes: each piece costs some milliseconds by itself, to wait for its copies and to give memory back to the driver."""


class Room:
    """The memory of all GPUs. Every change of what a client has is followed by settle()."""

    def __init__(self, policy: Policy, send: Callable[[int, Message], None], context: int = 0) -> None:
        """`context`: bytes that a client's CUDA context takes at most, which it does not count itself."""
        self._policy = policy
        self._send = send
        self._context = context
        self.driver = False
        """Whether the driver can move what the frameworks cannot."""
        self.migrates = False
        """Whether it can bring it back on another GPU."""
        self.unmovable: dict[int, Client] = {}
        """Clients that could not be evacuated."""
        self.suspended: dict[int, Client] = {}
        """Clients whose memory the driver has moved, and can bring back."""

    # --- books ------------------------------------------------------------------------------------------------------

    def settle(self, client: Client) -> None:
        """Book what the client counts for now on each of its GPUs."""
        books, before = client.books(), client.booked
        if books == before:
            return
        for gpu in client.gpus:
            gpu.in_use += books[0] - before[0]
            gpu.left_behind += books[1] - before[1]
            gpu.unmovable += books[2] - before[2]
            if books[0]:
                gpu.occupants[client.id] = client
            else:
                gpu.occupants.pop(client.id, None)
        client.booked = books

    def free(self, gpu: Gpu, client: Client) -> int:
        """Bytes of the GPU that are neither occupied by others nor promised to them."""
        return gpu.capacity - gpu.in_use + (client.booked[0] if gpu in client.gpus else 0)

    def hear(self, client: Client, said: int, peak: int = 0) -> None:
        """Take in what a client says it holds."""
        client.said = max(0, said)
        self.measure(client, self.in_all(client, said), peak)

    @staticmethod
    def in_all(client: Client, said: int) -> int:
        """What it holds that says so: its context comes to it, as soon as that is known."""
        return max(0, said) + max(0, client.context)

    def learn_context(self, client: Client, nbytes: int) -> None:
        """The device counts so many bytes of the client, which has said what it has."""
        client.context = min(self._context, max(0, nbytes - client.said))

    def measure(self, client: Client, resident: int, peak: int = 0) -> None:
        """Take in what a client holds, bounded by what can be there next to the others' memory."""
        gpus = client.gpus
        if not gpus:
            return
        capacity = min(gpu.capacity for gpu in gpus)
        client.measured = True
        client.resident = min(max(0, resident), *(self.free(gpu, client) for gpu in gpus))
        client.peak = max(client.peak, client.resident - max(0, client.context), min(peak, capacity))
        # When only a part could be restored, that part is not in host memory any more; in all it fits the GPU.
        client.evacuated = min(client.evacuated, capacity - client.resident)
        self.settle(client)

    def cannot_move(self, client: Client, reason: str) -> None:
        """The client could not be evacuated; '': it can."""
        client.unmovable = reason
        client.stuck = client.absent or (bool(reason) and not (self.driver and not client.driver_problem))
        if reason:
            self.unmovable[client.id] = client
        else:
            self.unmovable.pop(client.id, None)
        self.settle(client)

    def host_memory_freed(self) -> list[Gpu]:
        """Host memory may be free again: who could not be evacuated may be asked once more. On these GPUs."""
        clients, self.unmovable = list(self.unmovable.values()), {}
        for client in clients:
            client.unmovable, client.stuck = "", False
            self.settle(client)
        return [gpu for client in clients for gpu in client.gpus]

    @staticmethod
    def refused(gpu: Gpu) -> list[Client]:
        """Those on the GPU who could not be moved, or of whom something has stayed."""
        return [o for o in gpu.occupants.values() if not o.lease and (o.unmovable or o.driver_problem or o.emptied)]

    def ask_again(self, gpu: Gpu) -> None:
        """They may be asked once more."""
        for client in self.refused(gpu):
            client.driver_problem, client.emptied = "", False
            self.cannot_move(client, "")

    # --- needs ------------------------------------------------------------------------------------------------------

    def want(self, client: Client, gpu: Gpu) -> int:
        """Bytes that the client should have in all: what it said, or its settled peak with a margin, or its program's.

        Nothing is known: the whole GPU, less what others cannot take with them when they are evacuated. Its context is
        added as far as there is room: it may be less than is thought, and who asks for the whole GPU is to have that.
        """
        own = client.booked if gpu in client.gpus else (0, 0, 0)
        unmovable = gpu.unmovable - own[2]
        # Who cannot be moved may stay for ever: most of a GPU is better than waiting for all of it.
        staying = unmovable if 2 * unmovable <= gpu.capacity else 0
        left_behind = gpu.left_behind - own[1] + staying
        peak = client.peak
        if not (client.hint or client.need or self.settled(client)):
            known = client.profile.peak_bytes()
            if known is None or known < peak:
                return gpu.capacity - left_behind
            peak = known
        context = self._context if client.context < 0 else client.context
        floor = self.floor(client)
        least = max(floor, max(client.hint, client.need, client.peak) + context)
        most = gpu.capacity - left_behind
        if staying and floor > most:  # who is absent comes back, or ends: what is known to be needed is waited for
            most = min(floor, most + sum([o.resident for o in gpu.occupants.values() if o.absent and not o.lease]))
        if self.driver and least > most:
            # Contexts, too, can make way, where they must: those that the driver has not failed to move.
            others = [other for other in gpu.occupants.values() if other is not client and other.driver_problem]
            staying += sum([other.resident for other in others if other.emptied and not other.lease])
            most = max(most, min(gpu.capacity - staying, least))
        return min(most, max(least, int(peak * MARGIN) + context))

    @staticmethod
    def settled(client: Client) -> bool:
        """Whether the client's peak is believed to be the most it needs."""
        return client.steady >= STEADY << min(client.surprises, MAX_SURPRISES)

    @staticmethod
    def floor(client: Client) -> int:
        """Bytes that the client must have in all to run at all; 0: unknown."""
        return max(client.hint, client.need, client.peak, client.resident + client.evacuated)

    # --- making room ------------------------------------------------------------------------------------------------

    def make(self, gpu: Gpu, client: Client, want: int, now: float) -> bool:
        """Whether `want` bytes are there for the client now; if not, evacuate others as far as they can be."""
        room = self.free(gpu, client)
        if want <= room:
            return True
        others = [other for other in gpu.occupants.values() if other is not client]
        room += sum([other.resident for other in others if other.leaving])
        if want <= room:
            return False
        movable = [o for o in others if o.resident and not (o.lease or o.evacuating or o.emptied or o.unmovable)]
        movable = [o for o in movable if not o.absent]  # nobody would hear
        for victim in self._policy.victims(movable, now):
            if want <= room:
                break
            victim.evacuating, victim.evacuation_at = True, now
            room += victim.resident
            self._send(victim.id, Evacuate(self._piece(gpu, client, victim)))
        if self.driver and want > room:
            left = [o for o in others if o.resident and (o.unmovable or o.emptied) and not (o.lease or o.evacuating)]
            for victim in self._policy.victims([o for o in left if not o.driver_problem], now):
                if want <= room:
                    break
                victim.evacuating = victim.suspending = True
                victim.evacuation_at = now
                room += victim.resident
                self._send(victim.id, Suspend())
        return False

    @staticmethod
    def _piece(gpu: Gpu, client: Client, victim: Client) -> int:
        """Bytes after which the victim is to say what is free already; 0: the client has no use for a part."""
        if not Room.follows(gpu, client):
            return 0
        return min(MAX_PIECE, max(MIN_PIECE, victim.resident // PIECES))

    @staticmethod
    def follows(gpu: Gpu, client: Client) -> bool:
        """Whether the client can bring its memory back piece by piece, while others leave the GPU.

        Not beside other holders, who could be given what it waits for; not on several GPUs, which empty unevenly; and
        not what the driver has moved, which comes back as a whole.
        """
        return bool(client.evacuated) and not client.suspended and gpu.slots == 1 and client.unit.size == 1

    def make_all(self, needs: Sequence[tuple[Gpu, Client, int]], now: float) -> bool:
        """As make(), for several; where the first cannot be met, the others are furthered all the same."""
        met = [self.make(gpu, client, want, now) for gpu, client, want in needs]
        return False not in met

    def kept_by_holders(self, gpu: Gpu, client: Client) -> bool:
        """Whether what the client should have is not there before a holder gives his lease back."""
        others = [other for other in gpu.occupants.values() if other is not client]
        left = [o for o in others if not (o.lease or o.stuck or o.unclear)]
        movable = sum([o.resident for o in left if not o.emptied or (self.driver and not o.driver_problem)])
        return self.want(client, gpu) > self.free(gpu, client) + movable

    @staticmethod
    def beside(client: Client) -> int:
        """Bytes of others' memory on the client's fullest GPU that could make way."""
        sums = []
        for gpu in client.gpus:
            others = [o for o in gpu.occupants.values() if o is not client and not (o.lease or o.evacuating)]
            sums.append(sum([o.resident for o in others if not (o.emptied or o.unmovable or o.absent)]))
        return max(sums, default=0)

    @staticmethod
    def awaited(gpu: Gpu) -> bool:
        """Whether there is somebody's memory of whom it is not known whether it can be evacuated: he has not spoken."""
        return any(other.absent and not other.lease and not other.suspending for other in gpu.occupants.values())

    def coming(self, gpu: Gpu, client: Client) -> bool:
        """Whether others are being evacuated from the GPU."""
        return any(other.leaving for other in gpu.occupants.values() if other is not client)
