"""How long after one program's release does the next one run? Against a bare Unix-socket round trip, in one run.

Two processes pass the only (simulated) GPU to and fro through a real broker, each with ``with acb.gpu():``. A hand-over
is the time from just before the holder leaves its phase to just after the waiting process has entered its own; it
crosses three processes: holder, broker, waiter. Nothing lies on the GPU, so no memory is moved: this is the price of
the decision and of telling everybody, which a swap would come on top of.

The floor is what the kernel asks for one message there and one back between the same two processes, over a socket of
the same kind (SOCK_SEQPACKET), packets of the size of acb's. Every hand-over is followed by one round trip under the
same conditions: the initiator has just been running, the other side has been asleep for a while. (Sent back to back,
round trips are faster, since nobody has fallen asleep yet; they are reported too, as `roundtrip_hot_us`.)

Clock: time.monotonic(), which on Linux is common to all processes.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report

TARGET = 3.0
"""The median hand-over, in round trips."""

REST = 0.0005
"""Seconds that everybody rests before each measurement: in life a holder has not been asked a moment ago, either."""

BUSY = 0.0002
"""Seconds that whoever begins a measurement has been computing just before."""

PACKET = b"x" * 64
"""About as long as acb's messages."""

WARM_UP = 20
"""Rounds not counted."""

PEER = "import sys; from benchmarks.handover import peer; peer(*map(int, sys.argv[1:]))"

HOT_ROUND_TRIPS = 5
"""Back to back in each round, after the one that counts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handover", description=(__doc__ or "").split("\n\n")[0])
    report.add_arguments(parser)
    parser.add_argument("--rounds", type=_positive, default=500, metavar="N", help="hand-overs (default: %(default)s)")
    options = parser.parse_args(arguments)
    figures = measure(options.rounds)
    hand, trip, hot = figures["handover_us"], figures["roundtrip_us"], figures["roundtrip_hot_us"]
    rows = [
        report.Row("hand-over, release to grant (median)", f"{hand:.0f} µs", remark=_spread(figures, "handover")),
        report.Row("bare socket round trip (median)", f"{trip:.0f} µs", remark=_spread(figures, "roundtrip")),
        report.Row("the same, back to back (median)", f"{hot:.0f} µs", remark=_spread(figures, "roundtrip_hot")),
        report.Row(
            "hand-over in round trips", f"{figures['ratio']:.2f}", f"at most {TARGET:.0f}", figures["ratio"] <= TARGET
        ),
        report.Row("hand-over in back-to-back round trips", f"{figures['ratio_hot']:.2f}"),
    ]  # fmt: skip
    report.publish(
        f"Hand-over of a simulated GPU between two processes, {options.rounds} rounds", rows, figures, options.json
    )
    return 0


def measure(rounds: int) -> dict[str, Any]:
    """Run the two processes for so many rounds; all figures in microseconds."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with report.broker() as environment, ends[0], ends[1]:
        peers = [
            subprocess.Popen(
                [sys.executable, "-c", PEER, str(end.fileno()), str(number), str(rounds)],
                env=environment | {"ACB_NAME": f"peer{number}"},
                pass_fds=[end.fileno()],
                stdout=subprocess.PIPE,
                text=True,
            )
            for number, end in enumerate(ends)
        ]
        for end in ends:
            end.close()  # so that a peer whose partner dies sees it
        try:
            told = [json.loads(process.communicate(timeout=60 + rounds * 0.1)[0] or "{}") for process in peers]
        finally:
            for process in peers:
                process.kill()
                process.wait()
    if any(process.returncode for process in peers):
        raise SystemExit("a process of the benchmark failed; see above")
    released, granted = (told[0][key] | told[1][key] for key in ("released", "granted"))
    handovers = [(granted[n] - released[n]) / 1000 for n in released if int(n) >= WARM_UP]
    cold = [us for peer_ in told for us in peer_["cold"]]
    hot = [us for peer_ in told for us in peer_["hot"]]
    hand, trip, quick = (report.percentiles(samples) for samples in (handovers, cold, hot))
    return {
        "handover_us": hand["p50"],
        "roundtrip_us": trip["p50"],
        "ratio": hand["p50"] / trip["p50"],
        "roundtrip_hot_us": quick["p50"],
        "ratio_hot": hand["p50"] / quick["p50"],
        "ratio_of_minima": hand["min"] / trip["min"],
        "handover_percentiles_us": hand,
        "roundtrip_percentiles_us": trip,
        "roundtrip_hot_percentiles_us": quick,
        "rounds": len(handovers),
        "simulated": True,
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


def peer(descriptor: int, number: int, rounds: int) -> None:
    """One of the two processes. Whoever holds the GPU leads the round; number 0 begins. Prints its times as JSON."""
    import acb
    from acb.client import runtime

    link = socket.socket(fileno=descriptor)
    revoked = _Revoked()
    runtime.client().gate.add_listener(revoked)
    released: dict[int, int] = {}
    granted: dict[int, int] = {}
    cold: list[float] = []
    hot: list[float] = []
    phase = acb.gpu()
    for turn in range(rounds + WARM_UP):
        if turn % 2 == number:  # this process is to hold it first
            if turn == 0:
                phase.__enter__()
            revoked.heard.clear()
            link.send(b"wait at the gate")
            if not revoked.heard.wait(20):
                raise SystemExit("the broker has not revoked the lease within 20 s")
            _settle()
            released[turn] = time.monotonic_ns()
            phase.__exit__(None, None, None)
            while link.recv(256) == PACKET:
                link.send(PACKET)
        else:
            if link.recv(256) != b"wait at the gate":
                raise SystemExit("the other process is gone")
            phase.__enter__()
            granted[turn] = time.monotonic_ns()
            _settle()
            cold.append(_round_trip(link))
            hot += [_round_trip(link) for _ in range(HOT_ROUND_TRIPS)]
            link.send(b"on")
    if (rounds + WARM_UP) % 2 == number:
        phase.__exit__(None, None, None)
    json.dump({"released": released, "granted": granted, "cold": cold[WARM_UP // 2 :], "hot": hot}, sys.stdout)


def _settle() -> None:
    """Let everybody fall asleep, then be busy for a moment."""
    time.sleep(REST)
    end = time.monotonic() + BUSY
    while time.monotonic() < end:
        pass


def _round_trip(link: socket.socket) -> float:
    """Microseconds for one packet there and one back."""
    begin = time.monotonic_ns()
    link.send(PACKET)
    link.recv(256)
    return (time.monotonic_ns() - begin) / 1000


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def _spread(figures: dict[str, Any], name: str) -> str:
    p = figures[f"{name}_percentiles_us"]
    return f"min {p['min']:.0f}, 90 % under {p['p90']:.0f}, 99 % under {p['p99']:.0f}"


if __name__ == "__main__":
    sys.exit(main())
