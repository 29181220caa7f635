"""Reading Python's own options, looking commands up, and composing PYTHONPATH."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acb.launcher.command import CommandError, find, kept_out, python_flag_against
from acb.launcher.environment import BOOTSTRAP, broker_variables, initial_environment, with_bootstrap

LOOK_ALIKES = [f"{BOOTSTRAP}/", f"{BOOTSTRAP}x", f"x{BOOTSTRAP}", str(BOOTSTRAP.parent)]
ENTRIES = st.lists(st.sampled_from(["", "/a", "/b c", str(BOOTSTRAP), *LOOK_ALIKES]))


@given(ENTRIES)
def test_pythonpath(entries: list[str]) -> None:
    before = ":".join(entries)
    after = with_bootstrap(before)
    assert after.split(":").count(str(BOOTSTRAP)) == 1
    assert after.split(":")[0] == str(BOOTSTRAP)
    assert with_bootstrap(after) == after
    assert after.split(":")[1:] == [entry for entry in before.split(":") if before and entry != str(BOOTSTRAP)]


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("python x.py -I", None),
        ("python", None),
        ("python -", None),
        ("python -c -I", None),
        ("python -cI -S", None),
        ("python -m -I", None),
        ("python -mE", None),
        ("python -u -B -W -I x.py", None),
        ("python -X -E x.py", None),
        ("python -XI -WS x.py", None),
        ("python --check-hash-based-pycs always -E x.py", "-E"),
        ("python --version -E", None),
        ("python -P -s -B", None),
        ("python -I", "-I"),
        ("python3.12 -uBE x.py", "-E"),
        ("/usr/bin/python3 -W ignore -S x.py", "-S"),
        ("pypy3 -Xdev -sI", "-I"),
        ("ipython -I", None),
        ("bash -I", None),
    ],
)
def test_options_that_keep_acb_out(command: str, flag: str | None) -> None:
    argv = command.split()
    assert python_flag_against("/no/such/file", argv) == flag


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        ("#!/usr/bin/python3 -I", "-I"),
        ("#! /usr/bin/python3 -uE\r", "-E"),
        ("#!/usr/bin/env python3", None),
        ("#!/usr/bin/env -S python3 -S -u", "-S"),
        ("#!/bin/sh -E", None),
        ("#!", None),
        ("", None),
    ],
)
def test_scripts_that_keep_acb_out(tmp_path: Path, line: str, flag: str | None) -> None:
    script = tmp_path / "script"
    script.write_text(line + "\nrest")
    assert python_flag_against(str(script), ["script", "-I"]) == flag


@pytest.mark.parametrize(
    ("command", "found"),
    [
        ("env python -I x.py", ("python", "-I")),
        ("env -u A -C / -- B=c python3 -E", ("python3", "-E")),
        ("env -i python x.py", ("env", "-i")),
        ("/usr/bin/env - PATH=/bin sh x", ("/usr/bin/env", "-")),
        ("env -vi python x.py", ("env", "-i")),
        ("env --ignore-environment python", ("env", "--ignore-environment")),
        ("env PYTHONPATH=/x python x.py", ("env", "PYTHONPATH=...")),
        ("env -u PYTHONPATH python", ("env", "-u PYTHONPATH")),
        ("env -uPYTHONPATH python", ("env", "-u PYTHONPATH")),
        ("env --unset=PYTHONPATH python", ("env", "-u PYTHONPATH")),
        ("env --unset PYTHONPATH python", ("env", "-u PYTHONPATH")),
        ("env -S python -I", ("python", "-I")),
        ("nice -n 5 timeout -k 1 -s KILL 10 python -S x.py", ("python", "-S")),
        ("nice --adjustment 5 nohup python -I", ("python", "-I")),
        ("timeout --signal=KILL 10 env -i true", ("env", "-i")),
        ("taskset -c 0,1 numactl -N 0 --membind 0 python -I", ("python", "-I")),
        ("stdbuf -oL -e L python -I", ("python", "-I")),
        ("env -uiI python x.py", None),
        ("env -C -i python x.py", None),
        ("env A=-i python x.py -I", None),
        ("env", None),
        ("env -u", None),
        ("timeout 10", None),
        ("timeout 10 no_such_command_anywhere -I", None),
        ("nice python x.py -I", None),
        ("sh -c python -I", None),
    ],
)
def test_wrappers_are_looked_through(command: str, found: tuple[str, str] | None, tmp_path: Path) -> None:
    for name in ("python", "python3"):
        (tmp_path / name).touch(0o755)
    assert kept_out("/no/such/file", command.split(), str(tmp_path)) == found


def test_a_script_behind_a_wrapper(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.touch(0o755)
    script.write_text("#!/usr/bin/python3 -I\n")
    assert kept_out("/usr/bin/nice", ["nice", "script"], str(tmp_path)) == ("script", "-I")


def test_looking_a_command_up(tmp_path: Path) -> None:
    for place in ("first", "second", "third"):
        (tmp_path / place).mkdir()
    (tmp_path / "first" / "tool").mkdir()
    for place, mode in (("second", 0o644), ("third", 0o755)):
        (tmp_path / place / "tool").touch(mode)
        (tmp_path / place / "tool").chmod(mode)
    path = f"{tmp_path}/first:{tmp_path}/second:{tmp_path}/third"
    assert find("tool", path) == f"{tmp_path}/third/tool"
    assert find(f"{tmp_path}/third/tool", None) == f"{tmp_path}/third/tool"
    assert find("sh", None).endswith("bin/sh")
    for name, search, status in (
        ("tool", f"{tmp_path}/first:{tmp_path}/second", 126),
        ("tool", f"{tmp_path}/first", 127),
        (f"{tmp_path}/first", path, 126),
        (f"{tmp_path}/second/tool", path, 126),
        (f"{tmp_path}/nowhere", path, 127),
        ("", path, 127),
        ("tool", "", 127),
    ):
        with pytest.raises(CommandError) as caught:
            find(name, search)
        assert caught.value.status == status


def test_variables_of_a_broker(tmp_path: Path) -> None:
    file = tmp_path / "broker.env"
    assert broker_variables(file) == {}
    file.write_text("ACB_SIMULATED=/a=b c\nLD_PRELOAD=x\nACB_bad=1\n\nACB_LAST=1")
    assert broker_variables(file) == {"ACB_SIMULATED": "/a=b c", "ACB_LAST": "1"}
    (tmp_path / "link").symlink_to(file)
    assert broker_variables(tmp_path / "link") == {}


def test_the_environment_this_process_was_started_with() -> None:
    initial = initial_environment()
    assert all("=" not in name[1:] and "\0" not in value for name, value in initial.items())
    assert initial.get("PATH") == os.environ.get("PATH") or "PATH" not in initial
