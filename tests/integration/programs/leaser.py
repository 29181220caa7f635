"""A program that uses acb by hand, one command a line from stdin, with memory of its own on a simulated card.

Every command is answered by one JSON line on stdout, every step of its evacuator that the test has asked to hold is
announced by one. Commands run in order on the main thread, but for those that begin with ``!``, which run at once, and
with ``&``, which run on a thread of their own.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Generator
from typing import Any

import acb
from acb.client import runtime
from acb.client.evacuation import EvacuationError, batches
from acb.devices.simulated import Card, CardOutOfMemory

printing = threading.Lock()


def say(**what: Any) -> None:
    with printing:
        sys.stdout.write(json.dumps(what) + "\n")
        sys.stdout.flush()


class Steps:
    """What an evacuator does step by step, for the test to hold and to fail."""

    def __init__(self) -> None:
        self.holds: set[str] = set()
        self.failures: dict[str, list[str]] = {}
        self.go_on = threading.Event()

    def step(self, name: str) -> None:
        """Stop here if the test has asked for it, and fail if it has asked for that."""
        if name in self.holds:
            say(step=name)
            assert self.go_on.wait(30)
            self.go_on.clear()
        how = self.failures.get(name)
        if how:
            kind = how.pop(0)
            if kind == "refuse":
                raise EvacuationError("cannot be moved today")
            if kind == "memory":
                raise MemoryError("no room on the GPU")
            if kind == "bug":
                raise ZeroDivisionError("a bug in a hook")


class Memory(Steps):
    """Blocks of bytes on the card, and the evacuator that moves them."""

    name = "leaser"

    def __init__(self) -> None:
        super().__init__()
        self._card: Card | None = None
        self.on_card: dict[str, bytes] = {}
        self.on_host: dict[str, bytes] = {}
        self.sizes: dict[str, int] = {}

    @property
    def card(self) -> Card:
        """The GPU that this process is bound to; before that, the first."""
        if self._card is None:
            client = runtime.client()
            assert client.simulated is not None
            card = Card.open(client.simulated, client.gpu or 0)
            if client.gpu is None:
                return card
            self._card = card
        return self._card

    def add(self, key: str, nbytes: int) -> None:
        """As a framework's allocation: short of memory, it asks the broker for room and tries again."""
        with self.card.operation("allocate"):
            pass
        while True:
            try:
                self.card.allocate(nbytes)
            except CardOutOfMemory:
                if not runtime.client().more_room(nbytes):
                    raise
            else:
                break
        self.on_card[key] = key.encode() * 3 + bytes([nbytes % 251])
        self.sizes[key] = self.sizes.get(key, 0) + nbytes  # what was there before stays on the card, too

    def operate(self) -> None:
        """One operation; every block must be there, unchanged."""
        with self.card.operation("operate"):
            assert not self.on_host, "memory is not on the card"
            for key, content in self.on_card.items():
                assert content[:-1] == key.encode() * 3, "memory was changed"

    def make_immovable(self) -> None:
        """From now on the framework refuses to move it."""
        self.failures["evacuate"] = ["refuse"] * 20

    def synchronize(self) -> None:
        self.step("synchronize")

    def resident(self) -> int:
        self.step("resident")
        return self.card.held()

    def peak(self) -> int:
        return self.card.peak()

    def reset_peak(self) -> None:
        self.step("reset_peak")
        self.card.reset_peak()

    def evacuation(self, piece: int = 0) -> Generator[int]:
        self.step("evacuate")
        yield 0
        for keys in batches(((key, self.sizes[key]) for key in list(self.on_card)), piece):
            self.step("piece")
            moved = sum(self.sizes[key] for key in keys)
            self.on_host |= {key: self.on_card.pop(key) for key in keys}
            self.card.free(moved)
            yield moved

    def restore(self, limit: int | None = None) -> int:
        self.step("restore")
        moved = 0
        for key in list(self.on_host):
            nbytes = self.sizes[key]
            if limit is not None and moved + nbytes > limit:
                break
            try:
                self.card.allocate(nbytes)
            except CardOutOfMemory as error:
                raise MemoryError(str(error)) from None
            self.on_card[key] = self.on_host.pop(key)
            moved += nbytes
            self.step("back")
        if self.on_host:
            self.step("part")
        return moved


memory: Any = None
"""A Memory, or a TorchMemory."""

phases: list[acb.gpu] = []


def mine() -> Any:
    global memory
    if memory is None:
        if os.environ.get("LEASER_MEMORY") == "torch":
            from torch_memory import TorchMemory

            memory = TorchMemory(Steps())
        else:
            memory = Memory()
            runtime.client().add_evacuator(memory)
        runtime.after_fork(forget)
    return memory


def forget() -> None:
    global memory
    memory = None
    phases.clear()


def enter(size: int | str | None = None) -> None:
    mine()
    phase = acb.gpu(size)
    phase.__enter__()
    phases.append(phase)


def leave() -> None:
    phases.pop().__exit__(None, None, None)


def add(key: str, nbytes: int) -> None:
    mine().add(key, nbytes)


def operate(count: int = 1) -> None:
    """Operations on the GPU; every block must be there, unchanged."""
    m = mine()
    for _ in range(count):
        m.operate()


def region(count: int = 1) -> None:
    """Whole regions as a hook makes them, with operations inside."""
    mine()
    gate = runtime.client().gate
    for _ in range(count):
        gate.enter()
        try:
            operate()
        finally:
            gate.exit()


def background(count: int) -> None:
    """Regions on another thread."""
    thread = threading.Thread(target=region, args=(count,))
    thread.start()
    thread.join()


def take_turns(rounds: int, nbytes: int) -> None:
    """A small program: load, then phases of work with CPU work in between."""
    with acb.gpu():
        add("model", nbytes)
        operate(3)
    for _ in range(rounds):
        sum(range(100_000))
        with acb.gpu():
            operate(5)


def region_until_released() -> int:
    """Regions without a pause, until release; how many."""
    m = mine()
    count = 0
    while not m.go_on.is_set():
        region()
        count += 1
    return count


def in_threads(threads: int, count: int) -> None:
    """Regions on several threads at once."""
    mine()
    running = [threading.Thread(target=region, args=(count,)) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def ask_in_threads(sizes: list[int]) -> list[bool]:
    """All ask for more room at once; who got it."""
    answers: dict[int, bool] = {}

    def ask(number: int) -> None:
        answers[number] = runtime.client().more_room(sizes[number])

    running = [threading.Thread(target=ask, args=(number,)) for number in range(len(sizes))]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return [answers[number] for number in range(len(sizes))]


def begin_on_a_thread_that_ends() -> None:
    thread = threading.Thread(target=acb.begin)
    thread.start()
    thread.join()


def wait_for_signal(number: int) -> int:
    """Block it on this thread, the only one that does not, and wait for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    say(step="signals blocked")
    got = signal.sigtimedwait([number], 30)
    return 0 if got is None else got.si_signo


def look_at_the_gate(count: int) -> None:
    """As threads that wait do once a second, but without a pause: be inside for a moment, and see that it is closed."""
    m = mine()
    gate = runtime.client().gate
    state = gate._local.state
    while not m.go_on.is_set():
        state.depth = 1
        assert gate.closed
        state.depth = 0
        gate._idle()


def count_refusals(threads: int) -> int:
    """Threads that enter at once; how many were refused."""
    refused = []

    def enter_it() -> None:
        try:
            runtime.client().gate.enter()
        except acb.LeaseRefused:
            refused.append(1)

    running = [threading.Thread(target=enter_it) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return len(refused)


def enter_on_a_daemon() -> None:
    """A thread that waits at the gate and does not keep the program from ending."""
    threading.Thread(target=enter, daemon=True).start()


def interrupted_enter() -> str:
    try:
        enter()
    except KeyboardInterrupt as error:
        return type(error).__name__
    return "entered"


def add_failing_listener() -> None:
    class Failing:
        def __getattr__(self, name: str) -> Any:
            raise ZeroDivisionError(name)

    runtime.client().gate.add_listener(Failing())  # type: ignore[arg-type]


def fork_and(*then: str) -> int:
    """Fork; the child runs one command more and exits with 0 if that went well."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        globals()[then[0]](*then[1:])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def read_in_c(fifo: str) -> int:
    """A call that no hook sees and that keeps the interpreter's lock, as one that the driver has stopped may; how many
    bytes came."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    say(step="in C")
    return ctypes.PyDLL(None).read(descriptor, ctypes.create_string_buffer(1), 1)


def read_outside(fifo: str) -> int:
    """A noted call that lets the interpreter's lock go, as page-locking does; how many bytes came."""
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)

    def read() -> int:
        say(step="outside")
        return len(os.read(descriptor, 1))

    return runtime.client().outside.run(read)


def nothing() -> None:
    pass


def held() -> int:
    return mine().card.held()


def violations() -> int:
    return len(mine().card.violations())


def facts() -> dict[str, Any]:
    client = runtime.client()
    return {
        "gpu": client.gpu,
        "gpus": list(client.gpus),
        "lease": client.agent.lease,
        "closed": client.gate.closed,
        "threads": [thread.name for thread in threading.enumerate()],
        "stand": "waiting" if client.agent._wanted else "",
    }


def free() -> None:
    m = mine()
    m.card.free(m.card.held())
    m.on_card, m.sizes = {}, {}


class Framework:
    """A second one, with no memory of its own, whose methods fail when they are told to."""

    name = "other"

    def __init__(self) -> None:
        self.failures: dict[str, list[str]] = {}
        self.synchronize = lambda: None
        self.reset_peak = lambda: None
        self.resident = self.peak = lambda: 0

    def evacuation(self, piece: int = 0) -> Generator[int]:
        yield 0
        if self.failures.get("evacuate"):
            raise EvacuationError(self.failures["evacuate"].pop())

    def restore(self, limit: int | None = None) -> int:
        return 0


framework = Framework()


def add_framework() -> None:
    runtime.client().add_evacuator(framework)


def fail_framework(step: str, *kinds: str) -> None:
    framework.failures[step] = list(kinds)


def make_immovable() -> None:
    mine().make_immovable()


def hold(*steps: str) -> None:
    mine().holds.clear()
    mine().holds.update(steps)


def step() -> None:
    """Go on to the next step that is held."""
    mine().go_on.set()


def release() -> None:
    """Go on, and hold no further step."""
    mine().holds.clear()
    mine().go_on.set()


def fail(step: str, *kinds: str) -> None:
    mine().failures[step] = list(kinds)


def main() -> None:
    commands: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()

    def run(name: str, arguments: list[Any]) -> None:
        try:
            say(done=name, result=globals()[name](*arguments))
        except Exception as error:
            say(failed=name, kind=type(error).__name__, message=str(error))

    def read() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            if name.startswith("!"):
                run(name[1:], arguments)
            elif name.startswith("&"):
                threading.Thread(target=run, args=(name[1:], arguments)).start()
            else:
                commands.put([name, *arguments])
        commands.put(["stop"])

    runtime.client()
    mine()
    threading.Thread(target=read, daemon=True).start()
    say(ready=os.getpid())
    while (command := commands.get())[0] != "stop":
        run(command[0], command[1:])


if __name__ == "__main__":
    main()
