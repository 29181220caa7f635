"""The command line of acb-launch: commands that cannot run, options, brokers running and missing, nesting."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_layout import Installation

from acb import config

SHOW = "import os; print(*sorted(f'{k}={v}' for k, v in os.environ.items() if k.startswith('ACB_')), sep='\\n')"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = Installation(tmp_path_factory.mktemp("installation"))
    yield made
    made.remove()


@pytest.fixture
def acb(installation: Installation) -> Iterator[Installation]:
    yield installation
    installation.stop_broker()
    installation.hooked()


def shown(result_stdout: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in result_stdout.splitlines())


@pytest.mark.parametrize("broker", [False, True], ids=["no broker", "broker"])
@pytest.mark.parametrize("disable", ["", "1"], ids=["", "disabled"])
class TestCommandsThatCannotRun:
    """None of them starts a broker, and each says in one line what is wrong."""

    def fails(self, acb: Installation, command: str, broker: bool, disable: str) -> tuple[int, str]:
        if broker:
            acb.start_broker()
        result = acb.launch(command, "argument", options=["--"], ACB_DISABLE=disable)
        assert result.stdout == ""
        assert result.stderr.startswith("acb-launch: ")
        assert result.stderr.count("\n") == 1
        if not broker:
            assert list(acb.runtime.iterdir()) == []
        return result.status, result.stderr

    def test_missing(self, acb: Installation, broker: bool, disable: str) -> None:
        status, message = self.fails(acb, "no-such-command", broker, disable)
        assert status == 127
        assert "no such command: no-such-command" in message

    def test_missing_file(self, acb: Installation, broker: bool, disable: str) -> None:
        status, message = self.fails(acb, "./no-such-file", broker, disable)
        assert status == 127
        assert "no such command: ./no-such-file" in message

    def test_nothing(self, acb: Installation, broker: bool, disable: str) -> None:
        assert self.fails(acb, "", broker, disable)[0] == 127

    def test_no_permission(self, acb: Installation, tmp_path: Path, broker: bool, disable: str) -> None:
        (tmp_path / "data").write_text("#!/bin/sh\n")
        status, message = self.fails(acb, str(tmp_path / "data"), broker, disable)
        assert status == 126
        assert "no permission" in message

    def test_directory(self, acb: Installation, tmp_path: Path, broker: bool, disable: str) -> None:
        status, message = self.fails(acb, str(tmp_path), broker, disable)
        assert status == 126
        assert "is a directory" in message


@pytest.mark.parametrize("broker", [False, True], ids=["no broker", "broker"])
def test_a_script_whose_interpreter_is_missing(acb: Installation, tmp_path: Path, broker: bool) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter -x\n")
    script.chmod(0o755)
    acb.start_broker()
    result = acb.launch(script, options=[] if broker else ["--broker", "off"])
    assert result == (126, "", f"acb-launch: cannot run {script}: its interpreter /no/such/interpreter is not there\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "which command?"),
        (["--"], "which command?"),
        (["--nonsense", "true"], "--nonsense"),
        (["--name"], "--name"),
        (["--name", "", "true"], "--name"),
        (["--broker", "perhaps", "true"], "auto, require or off"),
        (["--gpu-memory", "much", "true"], "--gpu-memory: 'much' is not a size"),
        (["--gpu-memory", "0", "true"], "impossible"),
        (["--gpu-memory", "10Gb", "true"], "--gpu-memory: '10Gb' may be bits or bytes"),
        (["--simulate-gpus", "1x-1GiB", "true"], "--simulate-gpus: '-1GiB' is not a size"),
        (["--gpu-memory", "10", "true"], "write a unit, such as 10GiB"),
        (["--simulate-gpus", "2GiB", "true"], "1x2GiB"),
        (["--simulate-gpus=0x2GiB", "true"], "1x2GiB"),
    ],
)
def test_wrong_usage(acb: Installation, options: list[str], message: str) -> None:
    result = acb.launch(options=options)
    assert (result.status, result.stdout) == (config.EX_USAGE, "")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(acb.runtime.iterdir()) == []


def test_a_trace_that_cannot_be_written(acb: Installation, tmp_path: Path) -> None:
    result = acb.launch("true", options=["--trace", str(tmp_path / "no" / "trace")])
    assert result.status == 73
    assert str(tmp_path / "no" / "trace") in result.stderr


def test_help_and_version(acb: Installation) -> None:
    said = acb.launch(options=["--help"]).stdout
    assert said.startswith("Usage: acb-launch [OPTION...] [--] COMMAND [ARGUMENT...]\n")
    for status in (config.EX_USAGE, config.EX_DATAERR, config.EX_UNAVAILABLE, config.EX_CANTCREAT, config.EX_TEMPFAIL):
        assert f"{status} " in said.rpartition("Exit statuses")[2]
    assert acb.launch(options=["--version"]).stdout.startswith("acb-launch 0.")
    assert acb.launch(options=["--name", "x", "--version"]).status == config.EX_USAGE  # x is not the end of the options
    assert acb.launch("printf", "%s", "--version") == (0, "--version", "")


class TestBrokers:
    """--broker auto, require and off; what the command gets to know."""

    def test_auto_starts_one_and_uses_it_from_then_on(self, acb: Installation) -> None:
        first = acb.launch(sys.executable, "-c", SHOW, options=["--simulate-gpus", "1x2GiB"])
        assert first.stderr == "gpu_assigner: a stand-in has started\n"
        second = acb.launch(sys.executable, "-c", SHOW, options=[])
        third = acb.launch(sys.executable, "-c", SHOW, options=["--simulate-gpus=1x2048MiB"])
        assert second == (0, first.stdout, "")
        assert third == second
        told = shown(first.stdout)
        assert told == {
            "ACB_BROKER": "auto",
            "ACB_HOME": str(acb.home),
            "ACB_PYTHON": str(acb.python),
            "ACB_RUNTIME_DIR": str(acb.runtime),
            "ACB_SIMULATED": str(acb.runtime / "simulated-1x2GiB"),
            "ACB_SOCKET": str(acb.runtime / "broker.sock"),
        }

    def test_quiet_keeps_the_brokers_messages_back(self, acb: Installation) -> None:
        result = acb.launch(sys.executable, "-c", SHOW, options=["--quiet", "--simulate-gpus", "1x2GiB"])
        assert result.stderr == ""
        assert shown(result.stdout)["ACB_QUIET"] == "1"

    @pytest.mark.parametrize("options", [[], ["--quiet"]])
    def test_without_a_gpu_it_says_how_to_simulate_one(self, acb: Installation, options: list[str]) -> None:
        result = acb.launch("echo", "ran", options=options, STANDIN_BROKER="no GPU")
        assert result.status == 69
        assert result.stdout == ""
        assert result.stderr == "gpu_assigner: this machine has no GPU; simulate one with --simulate-gpus 1x2GiB\n"

    def test_require_insists(self, acb: Installation) -> None:
        result = acb.launch("echo", "ran", options=["--broker", "require"])
        assert (result.status, result.stdout) == (69, "")
        assert "gpu_assigner start" in result.stderr
        assert result.stderr.count("\n") == 1
        acb.start_broker()
        told = acb.launch(sys.executable, "-c", SHOW, options=["--broker", "require"])
        assert shown(told.stdout)["ACB_BROKER"] == "require"
        assert acb.launch(sys.executable, "-c", SHOW, options=[], ACB_BROKER="require") == told

    def test_off_needs_none(self, acb: Installation) -> None:
        told = shown(acb.launch(sys.executable, "-c", SHOW).stdout)
        assert told["ACB_BROKER"] == "off"
        assert "ACB_SOCKET" not in told
        assert shown(acb.launch(sys.executable, "-c", SHOW, options=[], ACB_BROKER="off").stdout) == told
        assert list(acb.runtime.iterdir()) == []

    def test_off_with_simulated_gpus(self, acb: Installation) -> None:
        result = acb.launch(sys.executable, "-c", SHOW, options=["--broker=off", "--simulate-gpus=2x1GiB"])
        cards = Path(shown(result.stdout)["ACB_SIMULATED"])
        assert (cards / "gpu0.card").exists()
        shutil.rmtree(cards)

    def test_another_broker_than_the_one_asked_for(self, acb: Installation) -> None:
        acb.start_broker()
        result = acb.launch("echo", "ran", options=["--simulate-gpus", "1x2GiB"])
        assert (result.status, result.stdout) == (69, "")
        assert "gpu_assigner stop" in result.stderr

    def test_a_dead_broker_is_replaced(self, acb: Installation) -> None:
        acb.start_broker()
        pid = int((acb.runtime / "broker.pid").read_text())
        os.kill(pid, signal.SIGKILL)
        (acb.runtime / "broker.pid").write_text(f"{os.getpid()}\n")  # as if the number had been given out again
        (acb.runtime / "broker.sock").unlink()
        result = acb.launch("true", options=[])
        assert result == (0, "", "gpu_assigner: a stand-in has started\n")

    @pytest.mark.parametrize("job", ["SLURM_JOB_ID", "PJM_JOBID"])
    def test_a_job_has_its_own(self, acb: Installation, job: str) -> None:
        acb.start_broker()
        first = acb.launch(sys.executable, "-c", SHOW, options=[], **{job: "12.3"})
        assert "started" in first.stderr
        second = acb.launch(sys.executable, "-c", SHOW, options=[], **{job: "12.3"})
        assert second == (0, first.stdout, "")
        assert shown(second.stdout)["ACB_SOCKET"] == str(acb.runtime / "broker-12.3.sock")

    @pytest.mark.parametrize("how", ["runtime", "xdg", "socket", "untidy", "relative"])
    def test_wherever_the_runtime_directory_is(self, acb: Installation, how: str) -> None:
        place = acb.runtime / "acb"
        place.mkdir(mode=0o700)
        setting = {
            "runtime": {"ACB_RUNTIME_DIR": str(place)},
            "xdg": {"ACB_RUNTIME_DIR": None, "XDG_RUNTIME_DIR": str(acb.runtime)},
            "socket": {"ACB_SOCKET": str(place / "broker.sock")},
            "untidy": {"ACB_RUNTIME_DIR": f"{acb.runtime}/./acb/../acb//"},
            "relative": {"ACB_RUNTIME_DIR": "acb"},
        }[how]
        try:
            answers = [
                acb.launch("/usr/bin/printenv", "ACB_SOCKET", options=options, cwd=acb.runtime, **setting)
                for options in ([], [], ["--broker", "auto"])
            ]
            assert {answer.stdout for answer in answers} == {f"{place}/broker.sock\n"}
            assert [bool(answer.stderr) for answer in answers] == [True, False, False]
        finally:
            os.kill(int((place / "broker.pid").read_text()), signal.SIGKILL)
            shutil.rmtree(place)

    @pytest.mark.parametrize("mode", [0o777, 0o750])
    def test_a_runtime_directory_open_to_others(self, acb: Installation, mode: int) -> None:
        acb.runtime.chmod(mode)
        try:
            result = acb.launch("echo", "ran", options=[])
        finally:
            acb.runtime.chmod(0o700)
        assert (result.status, result.stdout) == (73, "")
        assert "chmod 700" in result.stderr

    def test_variables_of_the_broker_are_only_acbs_own(self, acb: Installation) -> None:
        acb.start_broker("--simulate-gpus", "1x1GiB")
        for options in ([], ["--broker", "auto"]):
            result = acb.launch("env", options=options)
            assert "ACB_SIMULATED=" in result.stdout
            assert "evil" not in result.stdout
            assert "ACB_odd" not in result.stdout


def test_options_become_variables(acb: Installation, tmp_path: Path) -> None:
    options = ["--broker=off", "--gpu-memory=1.5GiB", "--name", "a job", "--trace", "trace.jsonl", "--quiet", "--"]
    told = shown(acb.launch(sys.executable, "-c", SHOW, options=options, cwd=tmp_path).stdout)
    assert told["ACB_GPU_MEMORY"] == str(3 * 2**29)
    assert told["ACB_NAME"] == "a job"
    assert told["ACB_TRACE"] == str(tmp_path / "trace.jsonl")
    assert told["ACB_QUIET"] == "1"


def test_a_trace_without_a_broker(acb: Installation, tmp_path: Path) -> None:
    options = ["--broker=off", "--trace", str(tmp_path / "trace")]
    said = acb.launch("echo", "ran", options=options)
    assert said[:2] == (0, "ran\n")
    assert said.stderr.count("\n") == 1
    assert "nothing is written to the trace" in said.stderr
    assert acb.launch("echo", "ran", options=[*options, "--quiet"]).stderr == ""


@pytest.mark.parametrize("options", [[], ["--broker", "off"]], ids=["fast", "off"])
class TestPythonsThatIgnoreTheirEnvironment:
    """One warning, and the program runs."""

    CODE = "import sys; print(sys.flags.isolated, sys.flags.no_site, sys.flags.ignore_environment)"

    @pytest.mark.parametrize(
        "arguments", [["-I"], ["-S"], ["-E"], ["-Wignore", "-X", "dev", "-bsE"], ["-W", "once", "-I"]]
    )
    def test_warns_once(self, acb: Installation, arguments: list[str], options: list[str]) -> None:
        acb.start_broker()
        plain = acb.plain(sys.executable, *arguments, "-c", self.CODE)
        result = acb.launch(sys.executable, *arguments, "-c", self.CODE, options=options)
        assert (result.status, result.stdout) == (plain.status, plain.stdout)
        warning = result.stderr.removesuffix(plain.stderr)
        assert warning.startswith("acb-launch: warning: ")
        assert f"-{arguments[-1][-1]}" in warning
        assert warning.count("\n") == 1
        assert (
            acb.launch(sys.executable, *arguments, "-c", self.CODE, options=["--quiet", *options]).stderr
            == plain.stderr
        )

    @pytest.mark.parametrize("wrapper", [["env"], ["nice", "-n", "1", "env", "A=b"], ["timeout", "60"]])
    def test_warns_of_those_behind_others(self, acb: Installation, wrapper: list[str], options: list[str]) -> None:
        acb.start_broker()
        result = acb.launch(*wrapper, sys.executable, "-I", "-c", self.CODE, options=options)
        assert result.stdout == acb.plain(sys.executable, "-I", "-c", self.CODE).stdout
        assert result.stderr.startswith(f"acb-launch: warning: {sys.executable} is started with -I")
        assert acb.launch(*wrapper, sys.executable, "-c", self.CODE, options=options).stderr == ""

    @pytest.mark.parametrize("line", ["#!{} -I", "#!{}  -BE", "#!/usr/bin/env -S {} -u -S"])
    def test_warns_of_scripts(self, acb: Installation, tmp_path: Path, line: str, options: list[str]) -> None:
        acb.start_broker()
        script = tmp_path / "script"
        script.write_text(line.format(sys.executable) + "\n" + self.CODE)
        script.chmod(0o755)
        result = acb.launch(script, options=options)
        assert result.stdout == acb.plain(script).stdout
        assert result.stderr.startswith("acb-launch: warning: ")

    @pytest.mark.parametrize("arguments", [["-c", CODE, "-I"], ["-", "-E"], ["-W", "ignore", "-c", CODE]])
    def test_arguments_of_the_program_do_not_count(
        self, acb: Installation, arguments: list[str], options: list[str]
    ) -> None:
        acb.start_broker()
        assert acb.launch(sys.executable, *arguments, options=options).stderr == ""


class TestNesting:
    """acb-launch below acb-launch, and shells in between."""

    def test_twice_is_once(self, acb: Installation) -> None:
        acb.start_broker()
        code = "import torch, os, sys; print(os.environ['PYTHONPATH'], sys.path, [type(f) for f in sys.meta_path])"
        once = acb.launch(sys.executable, "-c", code, options=[])
        assert len(acb.hooked()) == 1
        for outer in ([], ["--broker", "off", "--name", "outer"]):
            for inner in ([], ["--broker", "auto"]):
                twice = acb.launch(
                    acb.launcher, *inner, "sh", "-c", '"$@"', "-", sys.executable, "-c", code, options=outer
                )
                assert twice == once
                assert len(acb.hooked()) == 1

    def test_the_inner_one_inherits(self, acb: Installation) -> None:
        result = acb.launch(
            acb.launcher, sys.executable, "-c", SHOW, options=["--broker=off", "--name=outer", "--gpu-memory=1GiB"]
        )
        told = shown(result.stdout)
        assert (told["ACB_BROKER"], told["ACB_NAME"], told["ACB_GPU_MEMORY"]) == ("off", "outer", str(2**30))

    def test_disabled_inside(self, acb: Installation) -> None:
        code = "import torch, sys; print(sys.path, [type(f).__name__ for f in sys.meta_path])"
        plain = acb.plain(sys.executable, "-c", code)
        assert acb.launch("env", "ACB_DISABLE=1", sys.executable, "-c", code) == plain
        assert acb.launch(acb.launcher, sys.executable, "-c", code, options=["--name=x"], ACB_DISABLE="1") == plain
        assert acb.hooked() == []
        assert acb.launch("env", "ACB_DISABLE=0", sys.executable, "-c", "import torch").status == 0
        assert len(acb.hooked()) == 1

    def test_an_emptied_environment(self, acb: Installation) -> None:
        for before in ((), ("timeout", "60", "nice")):
            ran = acb.launch(*before, "env", "-i", sys.executable, "-c", "print('ran')")
            assert ran[:2] == (0, "ran\n")
            assert "is started with -i, so acb cannot instrument it" in ran.stderr
            assert ran.stderr.count("\n") == 1


def test_an_interrupt_while_a_broker_starts_ends_it(acb: Installation, tmp_path: Path) -> None:
    """Ctrl-C is a death by SIGINT, without a traceback."""
    slow = acb.home / "acb" / "cli" / "gpu_assigner.py"
    text = slow.read_text()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    slow.write_text(f"import sys\nprint('starting', file=sys.stderr, flush=True)\nopen({str(fifo)!r}).read()\n")
    try:
        process = subprocess.Popen(
            [acb.launcher, "true"], env=acb.environment(), stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        assert process.stderr is not None
        assert process.stderr.readline() == "starting\n"
        os.killpg(process.pid, signal.SIGINT)
        rest = process.stderr.read()
        process.stderr.close()
        assert process.wait(60) == -signal.SIGINT
        assert "acb.launcher" not in rest
    finally:
        slow.write_text(text)
