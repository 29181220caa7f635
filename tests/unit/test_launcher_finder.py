"""The import finder: which imports it touches, what a hook sees, and what stays as it was."""

from __future__ import annotations

import copy
import importlib
import importlib.abc
import importlib.machinery
import pickle
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

from acb.launcher.finder import AcbFinder, HookLoader, register

NAME = "acb_test_framework"


@pytest.fixture
def finder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AcbFinder]:
    """A finder in front of all others, and a package NAME on sys.path that it may be asked to watch."""
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").write_text(
        "loader = __loader__\nspec_loader = __spec__.loader\nfinished = True\n"
    )
    (tmp_path / NAME / "part.py").write_text("")
    made = AcbFinder(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", [made, *sys.meta_path])
    monkeypatch.syspath_prepend(tmp_path)
    yield made
    for name in [name for name in sys.modules if name.split(".")[0] == NAME]:
        del sys.modules[name]


class Calls(list[types.ModuleType]):
    """A hook that remembers the modules it was called with."""

    def __call__(self, module: types.ModuleType) -> None:
        assert getattr(module, "finished", True)
        self.append(module)


def test_nobody_asked_about_it(finder: AcbFinder) -> None:
    assert finder.find_spec(NAME) is None


def test_a_hook_sees_the_finished_module(finder: AcbFinder) -> None:
    calls = Calls()
    finder.register(NAME, calls)
    assert calls == []
    module = importlib.import_module(NAME)
    assert calls == [module]
    importlib.import_module(f"{NAME}.part")
    importlib.import_module(NAME)
    assert calls == [module]


def test_the_loader_is_the_true_one(finder: AcbFinder) -> None:
    finder.register(NAME, Calls())
    module = importlib.import_module(NAME)
    for loader in (module.__loader__, module.__spec__.loader, module.loader, module.spec_loader):  # type: ignore[union-attr]
        assert type(loader) is importlib.machinery.SourceFileLoader
    of_every_package = {*vars(types.ModuleType(NAME)), "__file__", "__cached__", "__path__", "__builtins__"}
    assert vars(module).keys() == of_every_package | {"loader", "spec_loader", "finished"}


def test_a_submodule_can_be_watched(finder: AcbFinder) -> None:
    calls = Calls()
    finder.register(f"{NAME}.part", calls)
    importlib.import_module(NAME)
    assert calls == []
    assert calls != [importlib.import_module(f"{NAME}.part")] or len(calls) == 1


def test_registered_after_the_import(finder: AcbFinder) -> None:
    module = importlib.import_module(NAME)
    calls = Calls()
    finder.register(NAME, calls)
    assert calls == [module]


def test_registered_from_inside_the_import(finder: AcbFinder, capsys: pytest.CaptureFixture[str]) -> None:
    """From the module's own code, watched or not: once it has finished, or never."""
    calls = Calls()
    loading = Path(finder.home, NAME, "__init__.py")
    loading.write_text("import sys; sys.acb_test_register()\nfinished = True\n")
    sys.acb_test_register = lambda: finder.register(NAME, calls)  # type: ignore[attr-defined]
    try:
        module = importlib.import_module(NAME)
        assert calls == []
        assert "half imported" in capsys.readouterr().err
        importlib.reload(module)
        assert calls == [module, module]  # two registrations by now
    finally:
        del sys.acb_test_register  # type: ignore[attr-defined]


def test_registered_while_another_thread_imports(finder: AcbFinder) -> None:
    calls = Calls()
    Path(finder.home, NAME, "__init__.py").write_text("import sys; sys.acb_test_block()\nfinished = True\n")
    inside, go_on = threading.Event(), threading.Event()

    def block() -> None:
        inside.set()
        assert go_on.wait(30)

    sys.acb_test_block = block  # type: ignore[attr-defined]
    try:
        importing = threading.Thread(target=importlib.import_module, args=(NAME,))
        importing.start()
        assert inside.wait(30)
        registering = threading.Thread(target=finder.register, args=(NAME, calls))
        registering.start()
        go_on.set()
        importing.join(30)
        registering.join(30)
    finally:
        del sys.acb_test_block  # type: ignore[attr-defined]
    assert calls == [sys.modules[NAME]]


def test_reload_calls_again(finder: AcbFinder) -> None:
    calls = Calls()
    finder.register(NAME, calls)
    module = importlib.import_module(NAME)
    assert importlib.reload(module) is module
    assert calls == [module, module]
    assert type(module.__loader__) is importlib.machinery.SourceFileLoader


def test_a_failing_import_calls_nothing(finder: AcbFinder) -> None:
    calls = Calls()
    finder.register(NAME, calls)
    file = Path(finder.home, NAME, "__init__.py")
    text = file.read_text()
    file.write_text("raise ValueError('broken')  # a file of another size\n")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module(NAME)
    assert calls == []
    assert NAME not in sys.modules
    assert finder.executing == set()
    file.write_text(text)
    assert calls == [] != [importlib.import_module(NAME)]
    assert len(calls) == 1


def test_one_failing_hook_spoils_nothing(
    finder: AcbFinder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACB_QUIET", raising=False)
    calls = Calls()

    def fails(module: types.ModuleType) -> None:
        raise LookupError("no such function")

    finder.register(NAME, fails, label="framework")
    finder.register(NAME, calls)
    module = importlib.import_module(NAME)
    importlib.reload(module)
    assert calls == [module, module]
    assert capsys.readouterr().err == "acb: hook for framework disabled: LookupError: no such function\n"


def test_ctrl_c_in_a_hook_is_the_users(finder: AcbFinder) -> None:
    def interrupted(module: types.ModuleType) -> None:
        raise KeyboardInterrupt

    finder.register(NAME, interrupted)
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module(NAME)


def test_a_module_that_replaces_itself(finder: AcbFinder) -> None:
    Path(finder.home, NAME, "__init__.py").write_text(
        "import sys, types\nsys.modules[__name__] = types.SimpleNamespace(__name__=__name__, other=True)\n"
    )
    calls = Calls()
    finder.register(NAME, calls)
    assert calls == [] != [importlib.import_module(NAME)]
    assert [module.other for module in calls] == [True]


def test_finders_before_and_behind(finder: AcbFinder, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks those behind it only, once, and skips the ones that cannot be asked."""
    asked = []

    class Counting:
        def find_spec(self, *arguments: object) -> None:
            asked.append((self, arguments[0]))

    before, behind, dumb = Counting(), Counting(), object()
    monkeypatch.setattr(sys, "meta_path", [before, finder, dumb, behind, importlib.machinery.PathFinder])
    calls = Calls()
    finder.register(NAME, calls)
    spec = finder.find_spec(NAME)
    assert asked == [(behind, NAME)]
    assert spec is not None
    assert isinstance(spec.loader, HookLoader)


def test_a_loader_lent_passes_for_the_true_one(finder: AcbFinder) -> None:
    finder.register(NAME, Calls())
    spec = finder.find_spec(NAME)
    assert spec is not None
    loader: importlib.abc.Loader | None = spec.loader
    assert isinstance(loader, HookLoader)
    assert loader.path == spec.origin
    assert loader.is_package(NAME)
    assert loader.get_code(NAME) is not None
    for true in (pickle.loads(pickle.dumps(loader)), copy.copy(loader), copy.deepcopy(loader)):
        assert type(true) is importlib.machinery.SourceFileLoader
    assert not hasattr(HookLoader.__new__(HookLoader), "path")


def test_loaders_that_are_classes(finder: AcbFinder) -> None:
    calls = Calls()
    finder.register("zlib", calls)
    finder.register("this_is_not_there", calls)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("this_is_not_there")
    loaded = sys.modules.pop("zlib")
    try:
        module = importlib.import_module("zlib")
        assert calls == [loaded, module]
        assert module.__spec__ is not None
        assert not isinstance(module.__spec__.loader, HookLoader)
    finally:
        sys.modules["zlib"] = loaded


def test_without_a_finder_there_is_nothing_to_register_with(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [finder for finder in sys.meta_path if type(finder).__name__ != "AcbFinder"]
    monkeypatch.setattr(sys, "meta_path", others)
    with pytest.raises(RuntimeError, match="not started by acb-launch"):
        register(NAME, Calls())
    finder = AcbFinder("/nowhere")
    monkeypatch.setattr(sys, "meta_path", [*others, finder])
    register(NAME, Calls())
    assert NAME in finder.hooks
