"""A scratch installation of acb with its own Python, with stand-ins for the broker and the hooks, to run things in.

What the launcher is asked about here needs no GPU framework: the target imports a stand-in named torch, and the hook
for it, a stand-in too, notes in a file that it was called.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parents[2]

HOOK = """
import os

def install(module):
    if os.environ.get("STANDIN_HOOK_FAILS"):
        raise RuntimeError("no such luck")
    if os.environ.get("STANDIN_HOOK_EXITS"):
        raise SystemExit(3)
    with open(os.environ["STANDIN_HOOK_LOG"], "a") as log:
        log.write(f"{os.getpid()} {module.__name__} {getattr(module, 'FINISHED', False)}\\n")
"""

TORCH = """
import os
FINISHED = False
if os.environ.get("STANDIN_TORCH_FAILS"):
    raise RuntimeError("this torch cannot be imported")
import warnings
warnings.warn("a warning at the importer's line", stacklevel=2)
FINISHED = True
"""

DEVICES = """
class CardError(Exception):
    pass
"""

FOLDER = """
def try_out(directory, spec):
    directory.mkdir(mode=0o700, exist_ok=True)
    (directory / "gpu0.card").write_text(str(spec))
"""

BROKER = """
import os, socket, sys

def main():
    if os.environ.get("STANDIN_BROKER") == "no GPU":
        print("gpu_assigner: this machine has no GPU; simulate one with --simulate-gpus 1x2GiB", file=sys.stderr)
        return 69
    from acb.config import env_path, parse_simulated, pid_path, simulated_dir, socket_path
    simulated = parse_simulated(sys.argv[3]) if sys.argv[2:3] == ["--simulate-gpus"] else None
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(socket_path()))
    listener.listen()
    print("gpu_assigner: a stand-in has started", file=sys.stderr, flush=True)
    ready, told = os.pipe()
    if os.fork():
        os.close(told)
        os.read(ready, 1)
        return 0
    os.setsid()
    with open("/proc/self/comm", "w") as comm:
        comm.write("gpu_assigner")
    pid_path().write_text(f"{os.getpid()}\\n")
    if simulated:
        env_path().write_text(f"ACB_SIMULATED={simulated_dir(simulated)}\\nLD_PRELOAD=/evil.so\\nACB_odd=no\\n")
    for stream in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    os.write(told, b"x")
    os.close(told)
    while True:
        listener.accept()[0].close()

if __name__ == "__main__":
    sys.exit(main())
"""


class Result(NamedTuple):
    """How a program ended and what it wrote."""

    status: int
    stdout: str
    stderr: str


class Installation:
    """A virtual environment with acb in it, as pip would leave it; with stand-ins for some parts unless `true`."""

    def __init__(self, root: Path, *, true: bool = False) -> None:
        self.root = root
        self.bin = root / "bin"
        name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        self.home = root / "lib" / name / "site-packages"
        self.bootstrap = self.home / "acb" / "launcher" / "bootstrap"
        self.launcher = self.bin / "acb-launch"
        self.python = self.bin / name
        self.runtime = Path(tempfile.mkdtemp(prefix="acb-"))  # a socket's path must be short
        self.hook_log = root / "hooks.log"
        self.modules = root / "modules"
        self._make(name)
        package = self.home / "acb"
        if true:
            shutil.copytree(REPOSITORY / "acb", package)
        else:
            self._make_stand_ins(package)

    def _make(self, name: str) -> None:
        self.bin.mkdir(parents=True)
        base = Path(sys._base_executable)  # type: ignore[attr-defined]
        (self.root / "pyvenv.cfg").write_text(f"home = {base.parent}\ninclude-system-site-packages = false\n")
        for link in ("python", "python3", name):
            (self.bin / link).symlink_to(base)
        shutil.copy(REPOSITORY / "launcher" / "acb-launch", self.launcher)
        self.modules.mkdir()
        (self.modules / "torch").mkdir()
        (self.modules / "torch" / "__init__.py").write_text(TORCH)
        (self.modules / "torch" / "run.py").write_text("import sys; print(__name__, sys.modules['torch'].FINISHED)\n")

    def _make_stand_ins(self, package: Path) -> None:
        package.mkdir(parents=True)
        for part in ("__init__.py", "_version.py", "config.py"):
            shutil.copy(REPOSITORY / "acb" / part, package)
        shutil.copytree(REPOSITORY / "launcher", package / "launcher")
        standins = {"devices.simulated": DEVICES, "devices.simulated_folder": FOLDER}
        for module, text in {"cli.gpu_assigner": BROKER, "hooks.torch": HOOK, **standins}.items():
            parent, _, last = module.partition(".")
            (package / parent).mkdir(exist_ok=True)
            (package / parent / "__init__.py").touch()
            (package / parent / f"{last}.py").write_text(text)

    def environment(self, **changes: str | None) -> dict[str, str]:
        """This process's environment without what would disturb, with the stand-ins' places; None removes a name."""
        environ = {
            k: v for k, v in os.environ.items() if not k.startswith(("ACB_", "PYTHON", "SLURM_", "PJM_", "XLA_"))
        }
        environ |= {
            "ACB_RUNTIME_DIR": str(self.runtime),
            "PYTHONPATH": str(self.modules),
            "STANDIN_HOOK_LOG": str(self.hook_log),
        }
        for key, value in changes.items():
            environ.pop(key, None)
            if value is not None:
                environ[key] = value
        return environ

    def launch(
        self,
        *command: str | Path,
        options: Sequence[str] = ("--broker", "off"),
        stdin: str = "",
        cwd: Path | None = None,
        **changes: str | None,
    ) -> Result:
        """Run `command` under this installation's acb-launch."""
        return run(self.launcher, *options, *command, env=self.environment(**changes), stdin=stdin, cwd=cwd)

    def plain(self, *command: str | Path, stdin: str = "", cwd: Path | None = None, **changes: str | None) -> Result:
        """Run `command` as it is, with the same environment otherwise."""
        return run(*command, env=self.environment(**changes), stdin=stdin, cwd=cwd)

    def hooked(self) -> list[tuple[int, str, bool]]:
        """Process id, module and whether its code had run, for each call of the stand-in hook; then forget them."""
        if not self.hook_log.exists():
            return []
        lines = [line.split() for line in self.hook_log.read_text().splitlines()]
        self.hook_log.unlink()
        return [(int(pid), module, finished == "True") for pid, module, finished in lines]

    def start_broker(self, *options: str) -> None:
        """Start the stand-in broker."""
        command = [sys.executable, "-E", "-m", "acb.cli.gpu_assigner", "start", *options]
        subprocess.run(
            command, env=self.environment(), cwd=self.home, check=True, stderr=subprocess.DEVNULL, timeout=30
        )

    def stop_broker(self) -> None:
        """End the stand-in brokers, and forget them."""
        for file in self.runtime.glob("*.pid"):
            os.kill(int(file.read_text()), signal.SIGKILL)
        for file in self.runtime.glob("broker*"):
            file.unlink()

    def remove(self) -> None:
        """Leave nothing behind outside the test's own directory."""
        self.stop_broker()
        shutil.rmtree(self.runtime)


def run(*command: str | Path, env: dict[str, str], stdin: str = "", cwd: Path | None = None) -> Result:
    """Run a command to its end. A death by signal is a negative status; addresses in the output are made equal."""
    done = subprocess.run(
        [str(part) for part in command],
        env=env,
        cwd=cwd,
        input=stdin,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=60,
        check=False,
    )
    output, errors = (re.sub(r"0x[0-9a-f]+", "0x…", text) for text in (done.stdout, done.stderr))
    return Result(done.returncode, output, errors)
