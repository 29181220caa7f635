"""A program does the same under acb-launch as without it: output, status, signals, paths, tracebacks, environment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_layout import Installation

FAST: tuple[str, ...] = ()
SLOW = ("--broker", "auto")
OFF = ("--broker", "off")

PROGRAMS = {
    "arguments and paths": "import sys; print(sys.argv, sys.path, sys.executable, sys.orig_argv, sys.flags)",
    "main module": "import __main__; print({k: v for k, v in vars(__main__).items() if k != '__builtins__'})",
    "modules": "import sys; print(sorted(sys.modules))",
    "uncaught exception": "def f(): raise ValueError('wrong')\nf()",
    "exit status": "import sys; sys.exit(3)",
    "exit message": "import sys; sys.exit('no more')",
    "abrupt exit": "import os; os._exit(7)",
    "death by signal": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "death by broken pipe": "import os, signal; signal.signal(13, signal.SIG_DFL); os.kill(os.getpid(), 13)",
    "keyboard interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)",
    "standard input": "import sys; print(sys.stdin.read(), sys.stdin.isatty())",
    # Not SigQ: signals that wait are counted over all of the user's processes.
    "signal state": "print([x for x in open('/proc/self/status') if x.startswith(('SigB', 'SigI', 'SigC', 'Shd'))])",
    "open files": "import os; print(sorted(os.listdir('/proc/self/fd')))",
    "directory and mask": "import os; print(os.getcwd(), os.umask(0), os.getpgrp() == os.getppid(), os.getsid(0))",
    "standard error": "import sys; print('oops', file=sys.stderr)",
    "import": "import torch; print(torch.__spec__, torch.__loader__, type(torch.__loader__), sorted(vars(torch)))",
    "loader": "import torch, pickle; print(pickle.loads(pickle.dumps(torch.__loader__)).path)",
    "find without import": "from importlib import util; s = util.find_spec('torch'); print(s.origin, s.loader.path)",
    "reload": "import torch, importlib; print(importlib.reload(torch) is torch, torch.__loader__, torch.__spec__)",
    "missing import": "import torch.nothing",
    "missing module": "import nothing_of_that_name",
    "lazy import": (
        "import importlib.util as u, sys; s = u.find_spec('torch'); s.loader = u.LazyLoader(s.loader)\n"
        "m = u.module_from_spec(s); sys.modules['torch'] = m; s.loader.exec_module(m); print(m.FINISHED, m.__loader__)"
    ),
    "threads importing": (
        "import threading\ndef f():\n    import torch; assert torch.FINISHED\n"
        "t = [threading.Thread(target=f) for _ in range(8)]\n[x.start() for x in t]; [x.join() for x in t]"
    ),
}


@pytest.fixture(scope="module")
def acb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    installation = Installation(tmp_path_factory.mktemp("installation"))
    installation.start_broker()
    yield installation
    installation.remove()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_cannot_tell(acb: Installation, tmp_path: Path, name: str) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAMS[name])
    command = (sys.executable, str(program), "-I", "two words", "--broker", "")
    plain = acb.plain(*command, stdin="some input\n", cwd=tmp_path)
    assert plain.stdout or plain.stderr or plain.status  # else the comparison shows nothing
    for options in (FAST, OFF):
        assert acb.launch(*command, options=options, stdin="some input\n", cwd=tmp_path) == plain
        imports = "import torch" in PROGRAMS[name] or name == "lazy import"
        assert bool(acb.hooked()) == imports


@pytest.mark.parametrize("options", [FAST, OFF], ids=["fast", "off"])
def test_a_failing_import_fails_the_same(acb: Installation, tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "program.py").write_text("try:\n    import torch\nexcept RuntimeError:\n    import torch")
    command = (sys.executable, str(tmp_path / "program.py"))
    plain = acb.plain(*command, STANDIN_TORCH_FAILS="1")
    assert acb.launch(*command, options=options, STANDIN_TORCH_FAILS="1") == plain
    assert plain.stderr.count("RuntimeError: this torch cannot be imported") == 2
    assert acb.hooked() == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", "import sys; print(sys.argv, sys.path)", "a"],
        ["-m", "torch.run"],
        ["-"],
        ["-bW", "ignore", "-Xutf8", "-mtorch.run"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("options", [FAST, OFF], ids=["fast", "off"])
def test_every_way_to_start_python(
    acb: Installation, tmp_path: Path, arguments: list[str], options: tuple[str, ...]
) -> None:
    stdin = "import sys; print(sys.argv, sys.path)"
    plain = acb.plain(sys.executable, *arguments, stdin=stdin, cwd=tmp_path)
    assert acb.launch(sys.executable, *arguments, options=options, stdin=stdin, cwd=tmp_path) == plain
    assert plain.status == 0
    assert bool(acb.hooked()) == ("torch.run" in arguments[-1])


@pytest.mark.parametrize("options", [FAST, SLOW], ids=["fast", "slow"])
@pytest.mark.parametrize("kind", ["python", "env python", "sh", "none"])
def test_scripts(acb: Installation, tmp_path: Path, kind: str, options: tuple[str, ...]) -> None:
    script = tmp_path / "script"
    first = {
        "python": f"#!{sys.executable}\n",
        "env python": "#!/usr/bin/env  python3\n",
        "sh": "#! /bin/sh -e\n",
        "none": "",
    }
    body = "import sys; print(sys.argv)\n" if "python" in kind else 'echo "$0" "$@"; false; echo after; exit 4\n'
    script.write_text(first.get(kind, "") + body)
    script.chmod(0o755)
    if kind == "none":  # no kernel runs it; a shell does, and so does execvp(3)
        plain = acb.plain("/bin/sh", "./script", "an argument", cwd=tmp_path)
    else:
        plain = acb.plain("./script", "an argument", cwd=tmp_path)
    assert acb.launch("./script", "an argument", options=options, cwd=tmp_path) == plain


BASH_NAMES = """
BASH BASHOPTS BASHPID BASH_ALIASES BASH_ARGC BASH_ARGV BASH_ARGV0 BASH_CMDS BASH_COMMAND BASH_ENV BASH_LINENO
BASH_SOURCE BASH_SUBSHELL BASH_VERSINFO BASH_VERSION BASH_XTRACEFD CDPATH COLUMNS COMP_WORDBREAKS DIRSTACK ENV
EPOCHREALTIME EPOCHSECONDS EUID FUNCNAME GLOBIGNORE GROUPS HISTCMD HISTSIZE HOSTNAME HOSTTYPE IFS
LINENO LINES MACHTYPE MAPFILE OLDPWD OPTARG OPTERR OPTIND OSTYPE PIPESTATUS POSIXLY_CORRECT PPID PS1 PS4 PWD
RANDOM REPLY SECONDS SHELLOPTS SHLVL SRANDOM TIMEFORMAT TMOUT UID acb_home acb_set acb_self home _ EMPTY
"""

NOT_KEPT = ("ACB_", "PATH", "PYTHON", "_")  # the test sets them itself, and no shell keeps "_", the last command run

ENVIRONMENTS: dict[str, list[str]] = {
    "of today": [f"{name}={value}" for name, value in os.environ.items() if not name.startswith(NOT_KEPT)],
    "empty": [],
    "without locale": ["LC_ALL=C", "SHLVL=3"],
    "odd names": [
        "odd.name=1",
        "odd-name=2",
        "BASH_FUNC_f%%=() { :; }",
        "a[0]=1",
        "x+=3",
        "-x=4",
        "-i=5",
        "nl=a\nb=c\n",
    ],
    "names of bash": [f"{name}=1" for name in BASH_NAMES.split()],
    "another depth": ["SHLVL=abc", f"PWD={os.getcwd()}", "OLDPWD=/nowhere"],
    "bytes": ["BYTES=\udcff\udcfe"],
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("mode", ["fast", "slow", "disabled", "disabled slow"])
def test_the_environment_is_kept_to_the_byte(acb: Installation, name: str, mode: str) -> None:
    entries = [*ENVIRONMENTS[name], f"ACB_RUNTIME_DIR={acb.runtime}", f"PATH={os.environ['PATH']}"]
    if "disabled" in mode:
        entries.append("ACB_DISABLE=1")
    options = ["--broker", "auto"] if "slow" in mode else []
    launch = [str(acb.launcher), *options, "/bin/cat", "/proc/self/environ"]
    command = ["/usr/bin/env", "-i", "--", *entries, *launch]
    done = subprocess.run(command, capture_output=True, timeout=60, check=True)
    assert done.stderr == b""
    ours = {
        f"PYTHONPATH={acb.bootstrap}",
        f"ACB_HOME={acb.home}",
        f"ACB_PYTHON={acb.python}",
        f"ACB_SOCKET={acb.runtime}/broker.sock",
        "ACB_BROKER=auto",
        "XLA_PYTHON_CLIENT_PREALLOCATE=false",
    }
    got = done.stdout.decode(errors="surrogateescape").split("\0")[:-1]
    assert sorted(got) == sorted({*entries, *(set() if "disabled" in mode else ours)})


@pytest.mark.parametrize("path", ["", ":", "/a:/b", ":/a", "/a:", "{}", "{}:", "/a:{}:/b:{}", "{}x:/x{}:{}/", "x{}"])
@pytest.mark.parametrize("options", [FAST, SLOW], ids=["fast", "slow"])
def test_pythonpath_gains_one_entry_and_keeps_the_rest(acb: Installation, path: str, options: tuple[str, ...]) -> None:
    before = path.replace("{}", str(acb.bootstrap))
    result = acb.launch("/usr/bin/printenv", "PYTHONPATH", options=options, PYTHONPATH=before)
    rest = [entry for entry in before.split(":") if entry != str(acb.bootstrap)] if before else []
    assert result.stdout.removesuffix("\n").split(":") == [str(acb.bootstrap), *rest]


@pytest.mark.parametrize("options", [FAST, SLOW, OFF], ids=["fast", "slow", "off"])
def test_the_user_may_say_how_jax_takes_memory(acb: Installation, options: tuple[str, ...]) -> None:
    for value in ("true", ""):
        result = acb.launch(
            "/usr/bin/printenv", "XLA_PYTHON_CLIENT_PREALLOCATE", options=options, XLA_PYTHON_CLIENT_PREALLOCATE=value
        )
        assert result.stdout == value + "\n"


@pytest.mark.parametrize("options", [FAST, OFF], ids=["fast", "off"])
@pytest.mark.parametrize("ignore", [signal.SIGPIPE, signal.SIGINT, signal.SIGHUP, signal.SIGXFSZ])
def test_ignored_signals_stay_ignored(acb: Installation, ignore: signal.Signals, options: tuple[str, ...]) -> None:
    show = ["grep", "Sig[BIC]", "/proc/self/status"]  # SigQ counts the signals of all of the user's processes
    shell = f"trap '' {ignore}; exec \"$@\""
    plain = acb.plain("/bin/bash", "-c", shell, "-", *show)
    assert acb.plain("/bin/bash", "-c", shell, "-", str(acb.launcher), *options, *show) == plain


@pytest.mark.parametrize("options", [FAST, OFF], ids=["fast", "off"])
@pytest.mark.parametrize("stream", [0, 1, 2])
def test_a_closed_stream_stays_closed(acb: Installation, stream: int, options: tuple[str, ...]) -> None:
    code = "import os; os.makedirs('seen-' + '-'.join(sorted(os.listdir('/proc/self/fd'))))"
    names = []
    for prefix in ([], [str(acb.launcher), *options]):
        place = acb.root / f"closed-{stream}-{len(prefix)}"
        place.mkdir(exist_ok=True)
        shell = f'exec "$@" {stream}>&-'
        acb.plain("/bin/sh", "-c", shell, "-", *prefix, sys.executable, "-c", code, cwd=place)
        names.append(os.listdir(place))
    assert names[0] == names[1]
    assert names[0] != []


def test_it_is_the_same_process(acb: Installation) -> None:
    for options in (FAST, OFF):
        process = subprocess.Popen(
            [acb.launcher, *options, sys.executable, "-c", "import os; print(os.getpid())"],
            env=acb.environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        output, _ = process.communicate(timeout=60)
        assert int(output) == process.pid
