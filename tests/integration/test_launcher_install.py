"""Where the script acb-launch is installed, and how it finds its package from there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from launcher_layout import REPOSITORY, Installation, run


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    made = Installation(tmp_path_factory.mktemp("installation"))
    yield made
    made.remove()


@pytest.fixture
def acb(installation: Installation) -> Iterator[Installation]:
    yield installation
    installation.stop_broker()


class TestWhereItIsInstalled:
    """The script finds the package acb beside itself, however it is called."""

    def home(self, acb: Installation, launcher: Path | str, cwd: Path | None = None, path: str = "") -> str:
        environ = acb.environment(PATH=f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"])
        answers = [
            run(launcher, *options, "/usr/bin/printenv", "ACB_HOME", "ACB_PYTHON", env=environ, cwd=cwd)
            for options in ([], ["--broker", "auto"], ["--broker", "off"])
        ]
        assert [answer.stderr for answer in answers] == [""] * 3
        homes = {answer.stdout for answer in answers}
        assert len(homes) == 1
        return homes.pop()

    def test_by_path_link_and_name(self, acb: Installation, tmp_path: Path) -> None:
        acb.start_broker()
        expected = f"{acb.home}\n{acb.python}\n"
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "acb-launch").symlink_to(acb.launcher)
        (tmp_path / "link").symlink_to("bin/acb-launch")
        assert self.home(acb, acb.launcher) == expected
        assert self.home(acb, "./acb-launch", cwd=acb.bin) == expected
        assert self.home(acb, "../bin/acb-launch", cwd=acb.bin) == expected
        assert self.home(acb, tmp_path / "bin" / "acb-launch") == expected
        assert self.home(acb, tmp_path / "link") == expected
        assert self.home(acb, "acb-launch", path=str(acb.bin)) == expected

    def test_in_a_checkout(self, acb: Installation) -> None:
        acb.start_broker()
        assert self.home(acb, REPOSITORY / "launcher" / "acb-launch").startswith(f"{REPOSITORY}\n")

    @pytest.mark.parametrize("kind", ["path", "finder"])
    def test_installed_for_editing(self, acb: Installation, tmp_path: Path, kind: str) -> None:
        acb.start_broker()
        packages = tmp_path / "lib" / acb.python.name / "site-packages"
        packages.mkdir(parents=True)
        shutil.copytree(acb.bin, tmp_path / "bin", symlinks=True)
        shutil.copy(acb.root / "pyvenv.cfg", tmp_path)
        if kind == "path":
            (packages / "__editable__.acb_gpu-0.1.0.pth").write_text(f"{acb.home}\n")
        else:
            text = f"import sys\nMAPPING: dict[str, str] = {{'acb': '{acb.home}/acb'}}\nNAMESPACES = {{}}\n"
            (packages / "__editable___acb_gpu_0_1_0_finder.py").write_text(text)
        assert self.home(acb, tmp_path / "bin" / "acb-launch") == f"{acb.home}\n{tmp_path}/bin/{acb.python.name}\n"

    def test_for_one_user_only(self, acb: Installation, tmp_path: Path) -> None:
        """No Python stands beside the script then; the one on PATH of the same version is taken."""
        acb.start_broker()
        (tmp_path / "bin").mkdir()
        shutil.copy(acb.launcher, tmp_path / "bin")
        shutil.copytree(acb.root / "lib", tmp_path / "lib")
        home = tmp_path / "lib" / acb.python.name / "site-packages"
        assert self.home(acb, tmp_path / "bin" / "acb-launch", path=str(acb.bin)) == f"{home}\n{acb.python}\n"

    def test_in_a_directory_with_a_space(self, acb: Installation, tmp_path: Path) -> None:
        acb.start_broker()
        place = tmp_path / "with a space"
        shutil.copytree(acb.root, place, symlinks=True)
        expected = f"{place / acb.home.relative_to(acb.root)}\n{place / 'bin' / acb.python.name}\n"
        assert self.home(acb, place / "bin" / "acb-launch") == expected

    def test_in_a_directory_with_a_colon(self, acb: Installation, tmp_path: Path) -> None:
        acb.start_broker()
        place = tmp_path / "with:a colon"
        shutil.copytree(acb.root, place, symlinks=True)
        for options in ([], ["--broker", "off"]):
            result = run(place / "bin" / "acb-launch", *options, "echo", "ran", env=acb.environment())
            assert (result.status, result.stdout) == (69, "")
            assert "colon" in result.stderr

    def test_what_lies_about_is_not_imported(self, acb: Installation, tmp_path: Path) -> None:
        """Neither the working directory nor PYTHONPATH can break the launcher or the start of a broker."""
        for module in ("acb", "re", "socket", "runpy", "sitecustomize"):
            (tmp_path / f"{module}.py").write_text("raise SystemExit('this must not be imported')")
        result = acb.launch("echo", "ran", options=[], cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert (result.status, result.stdout) == (0, "ran\n")

    def test_as_a_module(self, acb: Installation, tmp_path: Path) -> None:
        command = [acb.python, "-m", "acb.launcher", "--broker", "off", "/usr/bin/printenv", "ACB_HOME"]
        assert run(*command, env=acb.environment(), cwd=tmp_path) == (0, f"{acb.home}\n", "")
