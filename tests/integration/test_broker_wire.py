"""Whatever comes through its socket, the broker lives on, and serves those who behave."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from broker_harness import MIB, Peer, Site, wait_until

from acb import processes
from acb.protocol import (
    MAX_PACKET,
    VERSION,
    AskStatus,
    Evacuate,
    Evacuated,
    Goodbye,
    Grant,
    Hello,
    MoreRoom,
    Refused,
    Request,
    Restored,
    Revoke,
    Room,
    Status,
    Welcome,
    Yield,
    encode,
)

HELLO = Hello(VERSION, os.getpid(), "peer")


DEAF = """
import os, signal, socket, sys
from acb.protocol import VERSION, Hello, MoreRoom, Request, encode
peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
peer.connect(sys.argv[1])
for message in (Hello(VERSION, os.getpid(), "deaf"), Request()):
    peer.send(encode(message))
    peer.recv(1 << 17)
try:
    while True:
        peer.send(encode(MoreRoom(0, 5)))  # each is answered
except ConnectionError:
    print("disconnected", flush=True)
signal.pause()
"""
"""A client that has the lease, does not read what it is told, and lives on when it is disconnected."""


def welcome(site: Site, name: str = "peer", **facts: object) -> Peer:
    peer = site.connect()
    peer.send(Hello(VERSION, os.getpid(), name, **facts))  # type: ignore[arg-type]
    assert isinstance(peer.receive(), Welcome)
    return peer


def works(site: Site) -> None:
    """A client that behaves gets the GPU, and nobody who misbehaved still has it."""
    with welcome(site) as peer:
        peer.send(Request())
        assert isinstance(peer.receive(), Grant)
        peer.send(Yield(0))


@pytest.mark.parametrize(
    "packet",
    [
        b"\0",
        b"hello",
        b"{}",
        b"[]",
        b"null",
        b"\xff\xfe{",
        b"[" * 50_000,
        b'{"type":' * 8_000,
        b'{"type": "hello"}',
        b'{"type": "hello", "version": "1", "pid": 1, "name": "x"}',
        b'{"type": "hello", "version": 1.0, "pid": 1, "name": "x"}',
        b'{"type": "hello", "version": true, "pid": 1, "name": "x"}',
        b'{"type": "hello", "version": null, "pid": 1, "name": "x"}',
        b'{"type": "hello", "version": 1, "pid": ' + b"9" * 4000 + b', "name": "x"}',
        b'{"type": "evacuated", "resident": 0, "seconds": NaN}',
        b'{"type": "evacuated", "resident": 0, "seconds": 1e999}',
        json.dumps({"type": "x" * 60_000}).encode(),
        json.dumps({"type": "\N{SNOWMAN}" * 20_000}, ensure_ascii=False).encode(),
        b" " * (MAX_PACKET + 1),
        b'{"type": "ask_stop"}' + b" " * (1 << 17),
        os.urandom(1000),
    ],
    ids=range(21),
)  # fmt: skip
def test_nonsense_ends_the_connection_and_nothing_else(site: Site, packet: bytes) -> None:
    pid = site.start()
    with welcome(site) as patient, site.connect() as peer:
        patient.send(Request())
        assert isinstance(patient.receive(), Grant)
        peer.socket.send(packet)
        answer = peer.receive()
        assert isinstance(answer, Refused)
        assert len(answer.reason) < 300
        assert peer.receive() is None
        patient.send(MoreRoom(0, MIB))
        assert patient.receive() == Room(True)
    works(site)
    report = site.report()
    assert report is not None
    assert report["pid"] == pid
    assert site.broker_log().count("\n") == 1


def test_nonsense_of_random_bits(site: Site) -> None:
    """Flipped bits and cut ends of true packets: refused, or understood as something else, but survived."""
    site.start()
    dice = random.Random(5)
    packets = [
        encode(m) for m in (HELLO, Request(5), Yield(1, 2), Evacuated(0, 3, 0.5, "x"), Restored(3), MoreRoom(1, 2))
    ]
    for _ in range(150):
        with site.connect() as peer:
            for _ in range(6):
                packet = bytearray(dice.choice(packets))
                for _ in range(dice.randrange(3)):
                    packet[dice.randrange(len(packet))] ^= 1 << dice.randrange(8)
                try:
                    peer.socket.send(packet[: dice.randrange(1, len(packet) * 2)])
                except ConnectionError:
                    break
    works(site)


def test_another_version_is_refused_with_both_versions(site: Site) -> None:
    site.start()
    with site.connect() as peer:
        peer.send(Hello(VERSION + 1, 1, "from the future"))
        answer = peer.receive()
        assert isinstance(answer, Refused)
        assert f"version {VERSION + 1}" in answer.reason
        assert f"version {VERSION}" in answer.reason
        assert peer.receive() is None
    works(site)


def test_messages_out_of_turn_are_refused_or_ignored(site: Site) -> None:
    site.start()
    with site.connect() as peer:
        peer.send(Request())  # before the hello
        assert isinstance(peer.receive(), Refused)
        assert peer.receive() is None
    with welcome(site) as peer:
        peer.send(HELLO)
        assert isinstance(peer.receive(), Refused)
        peer.send(Room(True))
        assert isinstance(peer.receive(), Refused)
        for message in (Yield(1 << 60, 1 << 60), Evacuated(1 << 60, 1 << 60), Restored(5, 5), Yield(-5, -5)):
            peer.send(message)
        peer.send(MoreRoom(0, 5))
        assert peer.receive() == Room(False, "no lease is held")
        peer.send(Request(-7))
        assert isinstance(peer.receive(), Grant)
        peer.send(Request())
        peer.send(MoreRoom(-(1 << 60), -(1 << 60)))
        assert peer.receive() == Room(True)
        peer.send(MoreRoom(0, 1 << 61))
        room = peer.receive()
        assert isinstance(room, Room)
        assert not room.granted
    works(site)


def test_sizes_larger_than_the_gpu_are_refused_with_both(site: Site) -> None:
    site.start("1x64MiB")
    with welcome(site) as peer:
        peer.send(Request(65 * MIB))
        answer = peer.receive()
        assert isinstance(answer, Refused)
        assert "65MiB" in answer.reason
        assert "64MiB" in answer.reason
        peer.send(Request())  # without such a need it goes on
        assert isinstance(peer.receive(), Grant)


def test_lies_about_memory_cost_nobody_else_the_gpu(site: Site) -> None:
    site.start("1x64MiB")
    with welcome(site, gpu=0, holding=True, resident=1 << 61, evacuated=1 << 61, peak=1 << 61) as liar:
        with welcome(site) as honest:
            honest.send(Request())
            assert isinstance(liar.receive(), Revoke)
            liar.send(Yield(1 << 61, 1 << 61))  # the GPU itself knows that nothing of it is there
            assert honest.receive() == Grant(0, "0", 64 * MIB)


def test_a_client_that_says_it_holds_nothing_is_evacuated_of_what_it_holds(site: Site) -> None:
    site.start("1x64MiB")
    with welcome(site) as liar, welcome(site) as honest, site.card() as card:
        liar.send(Request())
        assert isinstance(liar.receive(), Grant)
        card.allocate(40 * MIB)
        honest.send(Request())
        assert isinstance(liar.receive(), Revoke)
        liar.send(Yield(0))
        assert isinstance(liar.receive(), Evacuate)
        liar.send(Evacuated(0, 40 * MIB))  # and has not moved it
        assert honest.receive() == Grant(0, "0", 24 * MIB)


def test_long_and_odd_names_are_shown(site: Site) -> None:
    site.start()
    names = ["\N{SNOWMAN}" * 9000, "[red]x[/blue]", "\ud800", "a\nb\x1b[31m", ":smile:", ""]
    peers = [welcome(site, name) for name in names]
    report = site.report()
    assert report is not None
    shortened = [re.sub("[\ud800\n\x1b]", "?", name[:64]) for name in names]
    assert [client["name"] for client in report["clients"]] == shortened
    shown = site.gpu_assigner("status", COLUMNS="250")
    assert shown.returncode == 0
    assert "[red]x[/blue]" in shown.stdout
    assert ":smile:" in shown.stdout
    assert "\x1b" not in shown.stdout
    for peer in peers:
        peer.close()
    works(site)


def test_status_with_300_clients_in_every_state(site: Site) -> None:
    site.start("4x64MiB")
    peers = [welcome(site, "\N{SNOWMAN}" * 64) for _ in range(300)]
    for peer in peers[:200]:
        peer.send(Request())
    wait_until("all requests", lambda: sum(c["state"] == "waiting" for c in (site.report() or {})["clients"]) == 196)
    report = json.loads(site.gpu_assigner("status", "--json").stdout)
    assert len(report["clients"]) == len({client["id"] for client in report["clients"]}) == 300
    assert len([client for client in report["clients"] if client["state"] == "running"]) == 4
    shown = site.gpu_assigner("status")
    assert shown.returncode == 0
    assert shown.stdout.count("waiting") == 196
    for peer in peers:
        peer.close()
    wait_until("them to be gone", lambda: (site.report() or {}).get("clients") == [])
    works(site)


def test_who_does_not_read_is_disconnected_and_holds_nobody_up(site: Site) -> None:
    site.start()
    with welcome(site) as deaf:
        with contextlib.suppress(ConnectionError):
            for _ in range(1 << 16):
                deaf.send(MoreRoom(0, 5))  # each is answered
            raise AssertionError("it may go on for ever")
        works(site)
    assert "does not read" in site.broker_log()
    works(site)


def test_who_does_not_read_keeps_what_it_has_until_it_ends(site: Site) -> None:
    site.start()
    command = [sys.executable, "-c", DEAF, str(site.socket)]
    deaf = subprocess.Popen(command, env=site.environment(), stdout=subprocess.PIPE)
    try:
        assert deaf.stdout is not None
        assert deaf.stdout.readline() == b"disconnected\n"
        wait_until("the broker to say so", lambda: "does not read" in site.broker_log())
        with welcome(site) as other:
            other.send(Request())
            clients = (site.report() or {})["clients"]
            assert {client["pid"]: client["state"] for client in clients} == {
                deaf.pid: "running",
                os.getpid(): "waiting",
            }
            deaf.kill()
            assert isinstance(other.receive(), Grant)
    finally:
        deaf.kill()
        deaf.communicate()


def test_a_stopped_holder_keeps_its_lease_however_many_come_and_give_up(site: Site) -> None:
    """Each time it is told, more than fits its socket; when it goes on, it knows how things stand."""
    site.start()
    program = site.program()
    program.do("enter")
    program.do("add", "data", 16 * MIB)
    program.send_signal(signal.SIGSTOP)
    wait_until("it to be stopped", lambda: processes.stopped(program.pid))
    for _ in range(400):
        with welcome(site) as passer_by:
            passer_by.send(Request())
            passer_by.send(AskStatus())
            assert isinstance(passer_by.receive(), Status), "nobody else is given the GPU"
    assert site.client(program)["state"] == "running"
    with welcome(site) as other:
        other.send(Request())
        program.send_signal(signal.SIGCONT)
        program.do("operate")
        program.do("leave")
        assert isinstance(other.receive(), Grant)
        other.send(Yield(0))
    program.do("enter")
    program.do("operate")
    assert "disconnected" not in site.broker_log()
    assert site.violations() == []


def test_who_asks_for_the_status_and_does_not_read_it(site: Site) -> None:
    site.start()
    with site.connect() as deaf:
        deaf.socket.setblocking(False)
        for _ in range(1 << 12):
            try:
                deaf.send(AskStatus())
            except BlockingIOError:
                break
        works(site)
        deaf.socket.setblocking(True)
        deaf.socket.settimeout(30)
        assert isinstance(deaf.receive(), Status)


def test_a_flood_of_silent_connections_keeps_nobody_out(site: Site) -> None:
    """More than the broker has file descriptors for: the oldest that never said hello make place."""
    limit = 64
    arguments = [sys.executable, "-m", "acb.cli.gpu_assigner", "start", "--foreground", "--simulate-gpus", "1x64MiB"]
    broker = subprocess.Popen(
        arguments,
        env=site.environment(),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )
    try:
        wait_until("the broker", site.report)
        with welcome(site) as patient:
            patient.send(Request())
            assert isinstance(patient.receive(), Grant)
            flood = [site.connect() for _ in range(3 * limit)]
            for _ in range(5):
                report = site.report()
                assert report is not None
                assert len(report["clients"]) == 1
            patient.send(MoreRoom(0, 5))
            assert patient.receive() == Room(True)
            patient.send(Yield(0))
            works(site)
            for peer in flood:
                peer.close()
        works(site)
    finally:
        broker.terminate()
        _, errors = broker.communicate(timeout=30)
    assert broker.returncode == 0
    assert [line.split()[1] for line in errors.splitlines()] == [b"started", b"ended"]
    assert os.listdir(site.directory) == []


def test_more_clients_than_file_descriptors_wait_for_those_that_go(site: Site) -> None:
    limit = 40
    arguments = [sys.executable, "-m", "acb.cli.gpu_assigner", "start", "--foreground", "--simulate-gpus", "1x64MiB"]
    broker = subprocess.Popen(
        arguments,
        env=site.environment(),
        stderr=subprocess.PIPE,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
    )
    peers = []
    try:
        wait_until("the broker", site.report)
        for _ in range(limit):
            peer = site.connect()
            peer.socket.settimeout(1.0)
            peer.send(HELLO)
            try:
                assert isinstance(peer.receive(), Welcome)
            except TimeoutError:  # one too many: it is in the queue of the socket
                break
            peers.append(peer)
        else:
            raise AssertionError("the limit had no effect")
        before = Path(f"/proc/{broker.pid}/stat").read_text().split()[13:15]
        peer.socket.settimeout(30)
        peers[0].close()
        assert isinstance(peer.receive(), Welcome)
        after = Path(f"/proc/{broker.pid}/stat").read_text().split()[13:15]
        assert sum(map(int, after)) - sum(map(int, before)) < 20, "it was busy all the time"  # hundredths of a second
    finally:
        for other in peers:
            other.close()
        peer.close()
        broker.send_signal(signal.SIGTERM)
        _, errors = broker.communicate(timeout=30)
    assert broker.returncode == 0
    assert b"cannot accept a connection" in errors


def test_many_who_come_and_go(site: Site) -> None:
    site.start()
    for _ in range(300):
        peer = site.connect()
        peer.send(HELLO)
        peer.send(Request())
        peer.close()
    works(site)
    wait_until("them to be gone", lambda: (site.report() or {}).get("clients") == [])
    assert json.loads((site.directory / "broker.journal").read_text())["clients"] == {}


def test_a_connection_of_another_user_is_refused(site: Site) -> None:
    if os.getuid():
        pytest.skip("only root can become another user")
    site.start()
    site.directory.chmod(0o711)
    site.socket.chmod(0o666)
    if not (child := os.fork()):
        status = 1
        try:
            os.setgid(65534)
            os.setuid(65534)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.connect(str(site.socket))
                try:
                    connection.send(encode(AskStatus()))
                    status = 0 if connection.recv(1 << 16) == b"" else 2
                except OSError as error:
                    status = 0 if error.errno in (errno.EPIPE, errno.ECONNRESET) else 3
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    wait_until("the refusal to be logged", lambda: "belongs to user id 65534" in site.broker_log())
    works(site)


def test_goodbye_is_the_last_that_everybody_hears(site: Site) -> None:
    site.start()
    with welcome(site) as first, welcome(site) as second:
        first.send(Request())
        assert isinstance(first.receive(), Grant)
        assert site.gpu_assigner("stop").returncode == 0
        for peer in (first, second):
            assert isinstance(peer.receive(), Goodbye)
            assert peer.receive() is None
