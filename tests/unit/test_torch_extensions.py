"""Gating of C++ extensions: what is called of them waits at the gate, whatever way they were loaded."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import standin_extension

torch: Any = pytest.importorskip("torch")
from gated_cpu import Gated, gated_cpu  # noqa: E402

from acb.client import runtime  # noqa: E402
from acb.hooks import elf  # noqa: E402

LIBRARIES = {
    "standin_plain": (),
    "standin_torch": ("libtorch_python.so", "libc10.so"),
    "standin_made": ("libtorch_python.so", "libc10.so"),
    "standin_cuda": ("libtorch_python.so", "libcudart.so.12"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the extensions."""
    directory = tmp_path_factory.mktemp("extensions")
    for name, libraries in LIBRARIES.items():
        standin_extension.build(directory, name, *libraries)
    return directory


@pytest.fixture
def gated(built: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gated]:
    """PyTorch with CPU tensors behind a gate, and the extensions on the path, not imported yet."""
    monkeypatch.syspath_prepend(str(built))
    with gated_cpu() as made:
        yield made
    for name in LIBRARIES:
        sys.modules.pop(name, None)


def nothing() -> None:
    """What the extension is given to call."""


def test_a_function_waits_when_it_is_given_something_on_the_device(gated: Gated) -> None:
    from standin_torch import work  # type: ignore[import-not-found]

    x = torch.ones(2)
    inside = []

    def look() -> int:
        inside.append(gated.gate.inside())
        return 7

    assert gated.stops(lambda: work(look, x))
    assert gated.stops(lambda: work(look, 1, more={"x": [x]}))
    assert gated.stops(lambda: work(look, 64, [[x], [x]]))
    assert inside == [True, True, True]
    assert not gated.stops(lambda: work(look, 3, "text", [1.5]))
    assert inside == [True, True, True, False]
    assert work(look, x) == 7
    with pytest.raises(TypeError, match="needs a function"):
        work()


def test_functions_of_modules_inside_it_wait_too(gated: Gated) -> None:
    module: Any = importlib.import_module("standin_torch")
    x = torch.ones(2)
    assert gated.stops(lambda: module.inner.work(nothing, x))
    del sys.modules["standin_torch"]
    again: Any = importlib.import_module("standin_torch")
    assert again is not module
    assert gated.stops(lambda: again.work(nothing, x))


def test_an_extension_that_is_loaded_by_its_file_is_gated(gated: Gated, built: Path) -> None:
    import torch.utils.cpp_extension as cpp_extension

    module = cpp_extension._import_module_from_library("standin_torch", str(built), True)
    x = torch.ones(2)
    assert gated.stops(lambda: module.work(nothing, x))


def test_every_function_waits_that_is_linked_against_cuda(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module("standin_cuda")
    assert gated.stops(lambda: module.work(nothing, 3))
    assert gated.stops(lambda: module.inner.work(nothing))
    assert not gated.stops(lambda: module.get_version(nothing))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not gated.stops(lambda: module.work(nothing, 3))


def test_calls_inside_a_module_belong_to_its_region(gated: Gated) -> None:
    extension: Any = importlib.import_module("standin_cuda")

    class Twice(torch.nn.Module):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            extension.work(nothing, x)
            extension.work(nothing, x)
            return x

    module, x = Twice(), torch.ones(1)
    gated.regions = 0
    module(x)
    assert gated.regions == 1


@pytest.mark.filterwarnings("ignore")  # torch.compile() warns of every builtin function that it cannot look into
def test_compiled_code_may_call_a_function(gated: Gated) -> None:
    extension: Any = importlib.import_module("standin_torch")
    compiled = torch.compile(lambda x: extension.work(lambda: 2, x) * x + 1, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [3.0, 3.0]


def test_what_is_not_linked_against_pytorch_stays_as_it_is(gated: Gated) -> None:
    module: Any = importlib.import_module("standin_plain")
    assert isinstance(module.work, types.BuiltinFunctionType)


def test_a_function_keeps_its_name_and_is_pickled_by_it(gated: Gated) -> None:
    import math

    module: Any = importlib.import_module("standin_torch")
    assert module.work.__name__ == module.work.__qualname__ == "work"
    assert module.work.__module__ == "standin_torch"
    assert module.work.__doc__ == "work(function, ...): call it"
    assert isinstance(module.work.__wrapped__, types.BuiltinFunctionType)
    assert pickle.loads(pickle.dumps(module.work)) is module.work
    assert module.sqrt is math.sqrt


def test_what_torch_compile_has_made_is_left_alone(gated: Gated, built: Path) -> None:
    spec = importlib.util.spec_from_file_location("cabcdef.standin_made", built / "standin_made.so")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module.work, types.BuiltinFunctionType)


def test_a_file_that_cannot_be_read_is_said_and_its_import_goes_on(
    gated: Gated, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(path: str) -> list[str]:
        raise OSError("gone")

    monkeypatch.setattr(elf, "needed", fails)
    monkeypatch.setattr(runtime, "_warned", set())
    module: Any = importlib.import_module("standin_torch")
    assert isinstance(module.work, types.BuiltinFunctionType)
    assert "functions of the extension standin_torch are not gated: OSError('gone')" in capsys.readouterr().err


def test_operators_of_torch_library_wait(gated: Gated) -> None:
    with torch.library._scoped_library("acb_standin", "FRAGMENT") as library:
        library.define("increase(Tensor x) -> Tensor")
        library.impl("increase", lambda x: x + 1, "CompositeExplicitAutograd")
        x = torch.ones(2)
        assert gated.stops(lambda: torch.ops.acb_standin.increase(x))
        assert gated.stops(lambda: torch.ops.acb_standin.increase.default(x))


def test_loading_goes_back_to_what_it_was() -> None:
    from importlib.machinery import ExtensionFileLoader

    before = ExtensionFileLoader.exec_module
    with gated_cpu():
        assert ExtensionFileLoader.exec_module is not before
    assert ExtensionFileLoader.exec_module is before


def test_libraries_are_read_from_the_file(built: Path, tmp_path: Path) -> None:
    for name, libraries in LIBRARIES.items():
        found = elf.needed(str(built / f"{name}.so"))
        assert [library for library in found if not library.startswith(("libc.", "libpython"))] == list(libraries)
    text = tmp_path / "text.so"
    text.write_text("no library")
    assert elf.needed(str(text)) == []
    whole = (built / "standin_torch.so").read_bytes()
    (tmp_path / "cut.so").write_bytes(whole[:100])
    with pytest.raises(ValueError, match="cut short"):
        elf.needed(str(tmp_path / "cut.so"))
