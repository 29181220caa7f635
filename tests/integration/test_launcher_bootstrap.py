"""Inside the program: the user's sitecustomize, child processes, hooks that fail, other Pythons, other packages acb."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_layout import Installation

SITECUSTOMIZE = {
    "plain": "import sys; print('customised', __name__, __file__, sys.path); sys.customised = True",
    "raising": "print('customised'); raise ValueError('wrong')",
    "exiting": "raise SystemExit(9)",
    "missing import": "import nothing_of_that_name",
    "package": None,
}


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = Installation(tmp_path_factory.mktemp("installation"))
    yield made
    made.remove()


@pytest.fixture
def acb(installation: Installation) -> Iterator[Installation]:
    yield installation
    installation.hooked()


@pytest.mark.parametrize("kind", SITECUSTOMIZE)
def test_the_users_own_sitecustomize_runs(acb: Installation, tmp_path: Path, kind: str) -> None:
    text = SITECUSTOMIZE[kind]
    if text is None:
        (tmp_path / "sitecustomize").mkdir()
        (tmp_path / "sitecustomize" / "__init__.py").write_text("from . import part\nprint('customised')")
        (tmp_path / "sitecustomize" / "part.py").touch()
    else:
        (tmp_path / "sitecustomize.py").write_text(text)
    code = "import sys; m = sys.modules.get('sitecustomize'); print(m, m and m.__spec__, hasattr(sys, 'customised'))"
    changes = {"PYTHONPATH": f"/nowhere:{tmp_path}:{acb.modules}"}
    for arguments in (["-c", code], ["-c", code + "; import sitecustomize; print(sitecustomize)"]):
        plain = acb.plain(sys.executable, *arguments, cwd=tmp_path, **changes)
        for prefix in ([], [acb.launcher, "--name=x"]):
            result = acb.launch(*prefix, sys.executable, *arguments, cwd=tmp_path, **changes)
            if kind == "exiting":  # Python dies of that, listing all frames of the import system
                assert result.stderr.splitlines()[-1] == plain.stderr.splitlines()[-1]
                assert result[:2] == plain[:2]
            else:
                assert result == plain
    assert "customised" in plain.stdout or kind in ("exiting", "missing import")


def test_a_sitecustomize_that_imports_a_framework(acb: Installation, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import torch")
    result = acb.launch(sys.executable, "-c", "pass", PYTHONPATH=f"{tmp_path}:{acb.modules}")
    assert result.status == 0
    assert [(name, finished) for _, name, finished in acb.hooked()] == [("torch", True)]


CHILDREN = {
    "fork": "p = multiprocessing.get_context('fork').Process(target=work.work); p.start(); p.join()",
    "spawn": "p = multiprocessing.get_context('spawn').Process(target=work.work); p.start(); p.join()",
    "forkserver": "p = multiprocessing.get_context('forkserver').Process(target=work.work); p.start(); p.join()",
    "pool": "from concurrent.futures import *\n    with ProcessPoolExecutor(1) as p: p.submit(work.work).result()",
    "subprocess": "subprocess.run([sys.executable, 'work.py'], check=True)",
    "shell": "os.system(f'{sys.executable} work.py')",
    "os.fork": "os.fork() or (work.work(), os._exit(0)); os.wait()",
    "exec": "os.execl(sys.executable, sys.executable, 'work.py')",
    "script": "subprocess.run(['./script'], check=True)",
}


@pytest.mark.parametrize("kind", CHILDREN)
def test_children_are_hooked(acb: Installation, tmp_path: Path, kind: str) -> None:
    (tmp_path / "work.py").write_text("def work():\n    import torch\nif __name__ == '__main__': work()\n")
    (tmp_path / "script").write_text(f'#!/bin/sh\nexec "{sys.executable}" work.py\n')
    (tmp_path / "script").chmod(0o755)
    (tmp_path / "program.py").write_text(
        f"import multiprocessing, os, subprocess, sys, work\nif __name__ == '__main__':\n    {CHILDREN[kind]}\n"
    )
    command = [sys.executable, "-Wignore", "program.py"]
    environ = {"PYTHONWARNINGS": "ignore"}
    process = acb.launch(*command, cwd=tmp_path, **environ)
    assert process == acb.plain(*command, cwd=tmp_path, **environ)
    assert process.status == 0
    assert [(name, finished) for _, name, finished in acb.hooked()] == [("torch", True)]


def test_a_shell_command_line_is_hooked(acb: Installation) -> None:
    result = acb.launch("bash", "-c", f"{sys.executable} -W ignore -c 'import torch' && echo done; exit 5")
    assert result == (5, "done\n", "")
    assert len(acb.hooked()) == 1


class TestHooksThatFail:
    """A hook never fails the program."""

    CODE = "import warnings; warnings.simplefilter('ignore'); import torch; print(torch.FINISHED)"

    def test_it_is_said_once(self, acb: Installation) -> None:
        code = self.CODE + "; import importlib; importlib.reload(torch)"
        result = acb.launch(sys.executable, "-c", code, STANDIN_HOOK_FAILS="1")
        assert result == (0, "True\n", "acb: hook for torch disabled: RuntimeError: no such luck\n")

    def test_not_even_by_exiting(self, acb: Installation) -> None:
        result = acb.launch(sys.executable, "-c", self.CODE, STANDIN_HOOK_EXITS="1")
        assert result == (0, "True\n", "acb: hook for torch disabled: SystemExit: 3\n")

    def test_quietly(self, acb: Installation) -> None:
        options = ["--broker", "off", "--quiet"]
        assert acb.launch(sys.executable, "-c", self.CODE, options=options, STANDIN_HOOK_FAILS="1") == (0, "True\n", "")

    def test_with_no_stderr(self, acb: Installation) -> None:
        shell = f'{sys.executable} -c "{self.CODE}" 2>&-'
        assert acb.launch("sh", "-c", shell, STANDIN_HOOK_FAILS="1") == (0, "True\n", "")

    def test_a_broken_installation(self, acb: Installation, tmp_path: Path) -> None:
        shutil.copytree(acb.root, tmp_path / "broken", symlinks=True)
        (tmp_path / "broken" / acb.home.relative_to(acb.root) / "acb" / "launcher" / "finder.py").unlink()
        bootstrap = tmp_path / "broken" / acb.bootstrap.relative_to(acb.root)
        changes = {"PYTHONPATH": f"{bootstrap}:{acb.modules}", "PYTHONDONTWRITEBYTECODE": "1"}
        result = acb.plain(sys.executable, "-c", self.CODE, **changes)
        assert (result.status, result.stdout) == (0, "True\n")
        assert "runs without acb" in result.stderr
        assert result.stderr.count("\n") == 1


class TestOtherPackagesNamedAcb:
    """Never two versions of acb in one program, and never ours in place of somebody else's."""

    CODE = "import torch, acb; print(acb.__file__)"

    def test_another_version_is_passed_over(self, acb: Installation, tmp_path: Path) -> None:
        shutil.copytree(acb.home, tmp_path / "other")
        (tmp_path / "other" / "acb" / "hooks" / "torch.py").write_text("raise RuntimeError('the wrong version')")
        changes = {"PYTHONPATH": f"{tmp_path / 'other'}:{acb.modules}", "PYTHONWARNINGS": "ignore"}
        result = acb.launch(sys.executable, "-c", self.CODE, **changes)
        assert result == (0, f"{acb.home}/acb/__init__.py\n", "")
        assert len(acb.hooked()) == 1
        result = acb.launch(sys.executable, "-c", "import acb, torch; print(acb.__file__)", **changes)
        assert result == (0, f"{acb.home}/acb/__init__.py\n", "")
        assert len(acb.hooked()) == 1

    def test_a_package_of_the_users_own_is_left_alone(self, acb: Installation, tmp_path: Path) -> None:
        (tmp_path / "acb.py").write_text("mine = True\n")
        changes = {"PYTHONPATH": f"{tmp_path}:{acb.modules}", "PYTHONWARNINGS": "ignore"}
        for code in (self.CODE, "import acb, torch; print(acb.__file__)"):
            result = acb.launch(sys.executable, "-c", code, cwd=tmp_path, **changes)
            assert (result.status, result.stdout) == (0, f"{tmp_path}/acb.py\n")
            assert result.stderr.startswith("acb: hook for torch disabled: ImportError: ")
            assert str(tmp_path / "acb.py") in result.stderr
        assert acb.hooked() == []

    def test_it_can_be_imported_where_it_is_not_installed(self, acb: Installation) -> None:
        """The program's Python is another one than acb's."""
        code = "import sys, acb.config, acb.launcher.finder as f; print(acb.config.__file__, sys.path)"
        plain = acb.plain(sys.executable, "-I", "-c", "import sys; print(sys.path)")
        result = acb.launch(sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code, PYTHONPATH=None)
        assert result.status == 0
        assert result.stdout.startswith(f"{acb.home}/acb/config.py ")
        assert plain.stdout.strip()[1:-1] in result.stdout
        assert str(acb.home) not in result.stdout.split(" ", 1)[1]


def test_frameworks_that_are_no_modules_of_python_code(acb: Installation, tmp_path: Path) -> None:
    """A bare directory named torch, as a data set may be, is not hooked and not in the way."""
    (tmp_path / "torch").mkdir()
    code = "import torch, importlib.util; print(torch.__path__, torch.__spec__, importlib.util.find_spec('jax'))"
    command = [acb.python, "-c", code]
    plain = acb.plain(*command, PYTHONPATH=str(tmp_path), cwd=tmp_path)
    assert acb.launch(*command, PYTHONPATH=str(tmp_path), cwd=tmp_path) == plain
    assert acb.hooked() == []


def other_pythons() -> list[str]:
    """Other versions of Python that lie about on this machine: the oldest, the newest, and the first supported."""
    names = [f"python3.{minor}" for minor in range(6, 16)]
    places = [os.path.realpath(place) for name in names if (place := shutil.which(name))]
    places += [str(place) for place in Path.home().glob(".pyenv/versions/*/bin/python")]
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    found = {}
    for place in places:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        done = subprocess.run([place, "-c", code], capture_output=True, text=True, timeout=30, check=False)
        if done.returncode == 0 and done.stdout.strip() != own:
            found[done.stdout.strip()] = place
    versions = sorted(found, key=lambda version: [int(number) for number in version.split(".")])
    chosen = {*versions[:1], *versions[-1:], "3.10"}
    return [found[version] for version in versions if version in chosen]


def test_pythons_of_other_versions(acb: Installation, tmp_path: Path) -> None:
    """From 3.10 on they are hooked; older ones run as they would have, with one line of explanation."""
    pythons = other_pythons()
    if not pythons:
        pytest.skip("no other version of Python on this machine")
    (tmp_path / "sitecustomize.py").write_text("print('customised')\n")
    (tmp_path / "program.py").write_text(
        "import sys, subprocess, torch\n"
        "print(sys.path, sys.version_info)\n"
        "if len(sys.argv) == 1: sys.stdout.flush(); subprocess.call([sys.executable, sys.argv[0], 'child'])\n"
    )
    changes = {"PYTHONPATH": f"{tmp_path}:{acb.modules}", "PYTHONWARNINGS": "ignore", "PYTHONDONTWRITEBYTECODE": "1"}
    for python in pythons:
        command = [python, str(tmp_path / "program.py")]
        plain = acb.plain(*command, **changes)
        result = acb.launch(*command, **changes)
        assert (result.status, result.stdout) == (plain.status, plain.stdout)
        if "minor=1" in result.stdout and "major=3" in result.stdout:
            assert result == plain
            assert len(acb.hooked()) == 2
        else:
            said = result.stderr.replace(plain.stderr, "")
            assert "acb needs 3.10 or newer" in said
            assert said.count("\n") == 1
            assert acb.hooked() == []
            assert acb.launch(*command, options=["--broker=off", "--quiet"], **changes) == plain
