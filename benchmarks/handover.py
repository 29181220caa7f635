"""How long after one program's release does the next one run? Against a bare Unix-socket round trip, in one run.

Two processes pass the only (simulated) GPU to and fro through a real broker, each with ``with acb.gpu():``. A hand-over
is the time from just before the holder leaves its phase, with the other process waiting at its gate, to just after that
one has entered its own; it crosses three processes: holder, broker, waiter. Nothing lies on the GPU, so no memory is
moved: this is the price of the decision and of telling everybody, which a swap would come on top of.

The floor is what the kernel asks for one message there and one back between the same two processes, over a socket of
the same kind (SOCK_SEQPACKET), with packets of the size of acb's. The two are measured in turn. Each process keeps to a
core of its own, as two programs at work do. (Left alone, a scheduler soon puts two processes that only talk on one
core, where a round trip is but two switches: `roundtrip_one_core_us`. A hand-over takes the same either way.)

In life phases last long, and what is not used is gone from the processor's caches and asleep: then either takes a
multiple. Some rounds more show it, in which everybody rests before each measurement (`rested`).

A broker of many programs must not be slower for it: the hand-over is also timed with hundreds of other clients
connected (`crowded`), in turn with a broker of these two alone.

Clock: time.monotonic(), which on Linux is common to all processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from acb.protocol import MAX_PACKET, VERSION, Hello, Welcome, decode, encode
from benchmarks import report

TARGET = 3.0
"""The median hand-over, in round trips."""

CROWDED_TARGET = 1.5
"""The median hand-over with many other clients, over that without."""

REST = 0.01
"""Seconds that everybody rests before each measurement, in the rounds that show what that does."""

RESTED_SHARE = 5
"""One such round for so many others."""

PACKET = b"x" * 64
"""About as long as acb's messages."""

WARM_UP = 20
"""Rounds not counted."""

PEER = "import sys; from benchmarks.handover import peer; print(peer(*map(int, sys.argv[1:])))"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handover", description=(__doc__ or "").split("\n\n")[0])
    report.add_arguments(parser)
    parser.add_argument(
        "--rounds", type=report.positive, default=500, metavar="N", help="hand-overs (default: %(default)s)"
    )
    parser.add_argument(
        "--others", type=report.positive, default=500, metavar="N",
        help="other clients, in the rounds with many (default: %(default)s)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    figures = measure(options.rounds)
    crowded = figures["crowded"] = measure_crowded(max(50, options.rounds // 2), options.others)
    rested = figures["rested"]
    rows = [
        _row("hand-over, release to grant (median)", figures, "handover"),
        _row("bare socket round trip (median)", figures, "roundtrip"),
        report.Row(
            "hand-over in round trips", f"{figures['ratio']:.2f}", f"at most {TARGET:.0f}", figures["ratio"] <= TARGET
        ),
        report.Row("the same of the minima", f"{figures['ratio_of_minima']:.2f}"),
        _row("bare socket round trip on one core", figures, "roundtrip_one_core"),
        _row(f"hand-over after {REST * 1000:.0f} ms of rest", rested, "handover"),
        _row("bare socket round trip after the same", rested, "roundtrip"),
        report.Row("hand-over in round trips after rest", f"{rested['ratio']:.2f}"),
        report.Row(
            f"hand-over with {options.others} other clients over that without",
            f"{crowded['ratio']:.2f}",
            f"at most {CROWDED_TARGET}",
            crowded["ratio"] <= CROWDED_TARGET,
            f"{crowded['with_us']:.0f} µs and {crowded['without_us']:.0f} µs",
        ),
    ]
    report.publish(
        f"Hand-over of a simulated GPU between two processes, {options.rounds} rounds", rows, figures, options.json
    )
    return 0


def measure_crowded(rounds: int, others: int) -> dict[str, Any]:
    """Medians, in microseconds, with so many `others` connected and without, measured in turn, and their ratio."""
    medians: dict[int, list[float]] = {0: [], others: []}
    for count in (0, others, others, 0):
        medians[count].append(measure(rounds, count)["handover_us"])
    without, crowded = (statistics.fmean(medians[count]) for count in (0, others))
    return {"others": others, "with_us": crowded, "without_us": without, "ratio": crowded / without, "rounds": rounds}


@contextlib.contextmanager
def _connected(count: int, path: Path) -> Iterator[None]:
    """So many other clients of the broker at `path`, in this process, which want nothing."""
    with contextlib.ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, count + 100)), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for number in range(count):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            connection.connect(str(path))
            connection.send(encode(Hello(VERSION, os.getpid(), f"other {number}")))
            if not isinstance(decode(connection.recv(MAX_PACKET)), Welcome):
                raise SystemExit("the broker does not take so many clients")
        yield


def measure(rounds: int, others: int = 0) -> dict[str, Any]:
    """Run the two processes for so many rounds, with `others` connected; all figures in microseconds."""
    with report.broker() as environment, _connected(others, Path(environment["ACB_RUNTIME_DIR"], "broker.sock")):
        told = play(environment, [[sys.executable, "-c", PEER]] * 2, rounds)
    return {**compare(told, rounds), "simulated": True}


class Told(NamedTuple):
    """What two processes have measured, in microseconds and in the order of the turns, those of the warm-up first.

    `handovers` are from release to grant, `used` from release to the end of the first operation on the GPU: none where
    they use it for nothing. `together`: round trips with both on one core. `intact`: whether what they hold on the GPU
    is as it was.
    """

    handovers: list[float]
    used: list[float]
    trips: list[float]
    together: list[float]
    intact: bool = True


def play(
    environment: dict[str, str],
    commands: Sequence[Sequence[str]],
    *arguments: int,
    patience: float | None = None,
) -> Told:
    """Have two processes pass a GPU to and fro (see peer()) in an `environment` in which they find their broker.

    Each is given its end of a socket, its number and the `arguments`, of which the first is the number of rounds.
    """
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ends[0], ends[1]:
        peers = [
            subprocess.Popen(
                [*command, *map(str, (end.fileno(), number, *arguments))],
                env=environment | {"ACB_NAME": f"peer{number}"},
                pass_fds=[end.fileno()],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number, (end, command) in enumerate(zip(ends, commands, strict=True))
        ]
        for end in ends:
            end.close()  # so that a peer whose partner dies sees it
        try:
            seconds = 60 + arguments[0] * 0.1 if patience is None else patience
            told = [json.loads(process.communicate(timeout=seconds)[0] or "{}") for process in peers]
        finally:
            for process in peers:
                process.kill()
                process.wait()
    if any(process.returncode for process in peers):
        raise SystemExit("a process of the benchmark failed; see above")
    released, granted, used, trips, together = (
        told[0][key] | told[1][key] for key in ("released", "granted", "used", "trips", "together")
    )
    turns = sorted(released, key=int)
    return Told(
        [(granted[turn] - released[turn]) / 1000 for turn in turns],
        [(used[turn] - released[turn]) / 1000 for turn in turns if turn in used],
        [trips[turn] for turn in turns],
        [together[turn] for turn in turns],
        all(one.get("intact", True) for one in told),
    )


def compare(told: Told, rounds: int) -> dict[str, Any]:
    """The figures of so many rounds after the warm-up, and of those after that, which were rested."""
    handovers, trips = told.handovers[WARM_UP:], told.trips[WARM_UP:]
    one_core = report.percentiles(told.together[WARM_UP:][:rounds])
    return {
        **_ratios(handovers[:rounds], trips[:rounds]),
        "roundtrip_one_core_us": one_core["p50"],
        "roundtrip_one_core_percentiles_us": one_core,
        "rounds": rounds,
        "rested": {**_ratios(handovers[rounds:], trips[rounds:]), "rounds": len(handovers) - rounds, "rest_s": REST},
    }


def _ratios(handovers: list[float], trips: list[float]) -> dict[str, Any]:
    hand, trip = report.percentiles(handovers), report.percentiles(trips)
    return {
        "handover_us": hand["p50"],
        "roundtrip_us": trip["p50"],
        "ratio": hand["p50"] / trip["p50"],
        "ratio_of_minima": hand["min"] / trip["min"],
        "handover_percentiles_us": hand,
        "roundtrip_percentiles_us": trip,
    }


# --- the two processes ------------------------------------------------------------------------------------------------


class _Revoked:
    """Tells the program's thread that the agent has heard of the other process's waiting (a GateListener)."""

    def __init__(self) -> None:
        self.heard = threading.Event()

    def watch(self) -> None:
        self.heard.set()

    def close(self) -> None:
        pass

    def open(self) -> None:
        pass


def peer(
    descriptor: int,
    number: int,
    rounds: int,
    *,
    warm_up: int = WARM_UP,
    rested: int | None = None,
    memory: int | None = None,
    load: Callable[[], Callable[[], None]] | None = None,
) -> str:
    """One of the two processes. Whoever holds the GPU leads the round; number 0 begins. Its times, as JSON.

    `rested`: how many rounds more with rest, by default RESTED_SHARE. `memory`: bytes that every phase asks for.
    `load`, called once, in the first phase, gives an operation on the GPU, to be done after every grant.
    """
    import acb
    from acb.client import runtime

    link = socket.socket(fileno=descriptor)
    revoked = _Revoked()
    runtime.client().gate.add_listener(revoked)
    released: dict[int, int] = {}
    granted: dict[int, int] = {}
    used: dict[int, int] = {}
    trips: dict[int, float] = {}
    together: dict[int, float] = {}
    available = sorted(os.sched_getaffinity(0))
    cores = (available[0], available[-1])
    os.sched_setaffinity(0, {cores[number]})
    phase = acb.gpu(memory)
    use: Callable[[], None] | None = None
    hot = warm_up + rounds
    total = hot + (-(-rounds // RESTED_SHARE) if rested is None else rested)
    for turn in range(total):
        rest = 0.0 if turn < hot else REST
        if turn % 2 == number:  # this process is to hold it first
            if turn == 0:
                phase.__enter__()
                use = load() if load else None
            revoked.heard.clear()
            link.send(b"wait at the gate")
            if not revoked.heard.wait(20):
                raise SystemExit("the broker has not revoked the lease within 20 s")
            time.sleep(rest)
            released[turn] = time.monotonic_ns()
            phase.__exit__(None, None, None)
            while link.recv(256) == PACKET:
                link.send(PACKET)
        else:
            if link.recv(256) != b"wait at the gate":
                raise SystemExit("the other process is gone")
            phase.__enter__()
            granted[turn] = time.monotonic_ns()
            if load and use is None:
                use = load()
            elif use:
                use()
                used[turn] = time.monotonic_ns()
            time.sleep(rest)
            trips[turn] = _round_trip(link)
            os.sched_setaffinity(0, {cores[turn % 2]})
            together[turn] = _round_trip(link)
            os.sched_setaffinity(0, {cores[number]})
            link.send(b"on")
    if total % 2 == number:
        phase.__exit__(None, None, None)
    told = {"released": released, "granted": granted, "used": used, "trips": trips, "together": together}
    return json.dumps(told)


def _round_trip(link: socket.socket) -> float:
    """Microseconds for one packet there and one back."""
    begin = time.monotonic_ns()
    link.send(PACKET)
    link.recv(256)
    return (time.monotonic_ns() - begin) / 1000


def _row(question: str, figures: dict[str, Any], name: str) -> report.Row:
    p = figures[f"{name}_percentiles_us"]
    spread = f"min {p['min']:.0f}, 90 % under {p['p90']:.0f}, 99 % under {p['p99']:.0f}"
    return report.Row(question, f"{p['p50']:.0f} µs", remark=spread)


if __name__ == "__main__":
    sys.exit(main())
