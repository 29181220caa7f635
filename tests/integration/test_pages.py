"""The pages of ``gpu_assigner status`` and ``acb doctor`` where they are hard to write: odd locales, full disks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broker_harness import Peer, Site

from acb.protocol import VERSION, Hello, Welcome

PAGES = {
    "status": ("acb.cli.gpu_assigner", "status"),
    "status --json": ("acb.cli.gpu_assigner", "status", "--json"),
    "doctor": ("acb.cli.acb", "doctor"),
    "doctor --json": ("acb.cli.acb", "doctor", "--json"),
}
ASCII = (
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
)


def page(site: Site, name: str, stdout: Any = subprocess.PIPE, **changes: str) -> subprocess.CompletedProcess[str]:
    module, *arguments = PAGES[name]
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=site.environment(**changes),
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )


def named(site: Site, name: str) -> Peer:
    """A client of this name."""
    peer = site.connect()
    peer.send(Hello(VERSION, os.getpid(), name))
    assert isinstance(peer.receive(), Welcome)
    return peer


@pytest.mark.parametrize("locale", ASCII)
def test_a_locale_without_unicode(site: Site, locale: dict[str, str]) -> None:
    site.start()
    with named(site, "a_program_of_a_long_name_" + "x" * 39), named(site, "\N{SNOWMAN}man"):
        shown = page(site, "status", COLUMNS="80", **locale)
    assert (shown.returncode, shown.stderr) == (0, "")
    names = [line.split()[1] for line in shown.stdout.splitlines() if line.split()[:1] == [str(os.getpid())]]
    assert names[0].startswith("a_pro")
    assert names[0].endswith("...")
    assert names[1] == "?man"
    for name in ("doctor", "status --json", "doctor --json"):
        said = page(site, name, **locale)
        assert (said.returncode, said.stderr) == (0, "")


@pytest.mark.parametrize("columns", [20, 40])
def test_a_narrow_terminal(site: Site, columns: int) -> None:
    site.start()
    with named(site, "a_program"):
        shown = page(site, "status", COLUMNS=str(columns))
    lines = shown.stdout.splitlines()
    heading = next(line.split() for line in lines if line.split()[:1] == ["process"])
    row = next(line.split() for line in lines if line.split()[:1] == [str(os.getpid())])
    assert dict(zip(heading, row, strict=True))["state"] == "detached"
    assert [line for line in lines[1:] if len(line) > columns and not line.startswith("(no room for: ")] == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("name", PAGES)
def test_a_full_disk(site: Site, name: str) -> None:
    site.start()
    with open("/dev/full", "w") as full:
        said = page(site, name, full)
    assert said.stderr.count("\n") == 1
    assert "cannot write to standard output: No space left on device" in said.stderr
    assert said.returncode == 73


@pytest.mark.parametrize("name", PAGES)
def test_a_reader_that_went_away(site: Site, name: str) -> None:
    site.start()
    read, write = os.pipe()
    os.close(read)
    try:
        said = page(site, name, write)
    finally:
        os.close(write)
    assert (said.returncode, said.stderr) == (141, "")


def test_asking_makes_no_directory(site: Site) -> None:
    missing = site.directory / "not" / "there"
    for arguments, status in ((["status"], 69), (["status", "--json"], 69), (["stop"], 69)):
        said = site.gpu_assigner(*arguments, ACB_RUNTIME_DIR=str(missing))
        assert said.returncode == status
        assert f"no GPU broker runs at {missing}/broker.sock" in said.stderr
    shown = page(site, "doctor", ACB_RUNTIME_DIR=str(missing), COLUMNS="250")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"{missing}, which the first broker or simulated GPU makes" in shown.stdout
    launched = subprocess.run(
        [sys.executable, "-m", "acb.launcher", "--broker", "require", "true"],
        env=site.environment(ACB_RUNTIME_DIR=str(missing)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert launched.returncode == 69
    assert list(site.directory.iterdir()) == []


def test_without_standard_output(site: Site, tmp_path: Path) -> None:
    site.start()
    for module, *arguments in PAGES.values():
        command = 'exec "$@" >&-'
        said = subprocess.run(
            ["/bin/sh", "-c", command, "sh", sys.executable, "-m", module, *arguments],
            env=site.environment(),
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
        assert (said.returncode, said.stderr) == (0, "")
