"""The import finder inside the user's program: calls a hook once a framework has been imported, and costs nothing else.

It stands first on sys.meta_path. A name that nobody asked about costs one dictionary test. For a name with hooks the
finder asks the finders behind it, as Python would have done, and lends the module a loader that runs the hooks after
the module's own code; the true loader is back in its place before that code starts. There is no lock of acb's own that
an import or a fork could hang on, and no exception of a hook leaves this file.

The bootstrap loads this file by its location, before anything else of acb and without a place in sys.modules, so it
imports only what start-up has loaded.
"""

import os
import sys

TYPE_CHECKING = False  # typing itself would cost more than all the rest of this file
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
    from typing import Any

    Hook = Callable[[ModuleType], object]

FRAMEWORKS = {"torch": "acb.hooks.torch", "jax": "acb.hooks.jax", "triton": "acb.hooks.triton"}
"""A framework's top module, and the module of acb whose ``install(module)`` instruments it."""


class AcbFinder:
    """A meta path finder that runs hooks after imports, and finds the package acb itself in `home`."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.hooks: dict[str, list[tuple[str, Hook]]] = {"acb": []}
        """For each module name: what to call when it has been imported, and what to call that in messages."""
        self.executing: set[str] = set()
        """Names of modules whose code is running under a HookLoader."""
        self._reported: set[str] = set()

    def find_spec(
        self, fullname: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        """The spec that the finders behind this one give, with a loader that runs hooks; None for any other name."""
        if fullname not in self.hooks:
            return None
        # Never through importlib.util.find_spec: that would come back here and can deadlock on import locks.
        spec = self._spec_behind(fullname, path, target)
        if fullname == "acb":
            return spec if spec is not None and not _is_acb(spec) else self._own_spec()
        loader = None if spec is None else spec.loader
        if spec is None or loader is None or not hasattr(loader, "exec_module") or isinstance(loader, HookLoader):
            return spec  # not found, a bare directory, or a loader of the oldest kind: nothing to run hooks after
        spec.loader = HookLoader(loader, self)  # type: ignore[assignment]
        return spec

    def _spec_behind(
        self, fullname: str, path: "Sequence[str] | None", target: "ModuleType | None"
    ) -> "ModuleSpec | None":
        finders = list(sys.meta_path)
        if self in finders:
            del finders[: finders.index(self) + 1]
        for finder in finders:
            find_spec = getattr(finder, "find_spec", None)
            if find_spec is None:
                if sys.version_info < (3, 12) and hasattr(finder, "find_module"):
                    return None  # Python itself knows how to ask such an old finder; the module is then not hooked
                continue
            spec: ModuleSpec | None = find_spec(fullname, path, target)
            if spec is not None:
                return spec
        return None

    def _own_spec(self) -> "ModuleSpec | None":
        from importlib.util import spec_from_file_location

        package = os.path.join(self.home, "acb")
        return spec_from_file_location(
            "acb", os.path.join(package, "__init__.py"), submodule_search_locations=[package]
        )

    def register(self, name: str, hook: "Hook", *, label: "str | None" = None) -> None:
        """Call `hook(module)` whenever the module `name` has been executed, and at once if it has been already.

        A hook must bear being called twice for one module: a reload executes it again, and threads may register and
        import at the same moment. Its exception is reported on stderr as ``acb: hook for LABEL disabled: …`` and goes
        no further.
        """
        label = label or name
        # One step, so no lock is needed: a thread that is importing `name` lists its hooks with this one or without it.
        self.hooks.setdefault(name, []).append((label, hook))
        module = sys.modules.get(name)
        if module is None or name in self.executing:
            return  # the import that comes, or that is under way, calls the hook
        if _initializing(module):
            module = __import__(
                name, fromlist=["__spec__"]
            )  # waits for the thread that is at it, unless it is this one
            if _initializing(module):
                self._report(label, ImportError(f"{name} was half imported when the hook was registered"))
                return
        self._call(label, hook, module)

    def executed(self, module: "ModuleType") -> None:
        """Call the hooks of a module whose code has run."""
        for label, hook in tuple(self.hooks.get(module.__name__, ())):
            self._call(label, hook, module)

    def _call(self, label: str, hook: "Hook", module: "ModuleType") -> None:
        try:
            hook(module)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit too: a hook must not end the program
            self._report(label, error)

    def _report(self, label: str, error: BaseException) -> None:
        """Say once a process, unless ACB_QUIET, that a hook is out of action."""
        if label in self._reported or os.environ.get("ACB_QUIET"):
            return
        self._reported.add(label)
        try:
            sys.stderr.write(f"acb: hook for {label} disabled: {type(error).__name__}: {error}\n")
        except Exception:
            pass  # no stderr to say it on; the program runs on all the same


class HookLoader:
    """A module's true loader, for one import: runs the module's code, then the hooks. Otherwise it passes for that."""

    def __init__(self, loader: "Loader", finder: AcbFinder) -> None:
        self._acb_loader = loader
        self._acb_finder = finder

    def __getattr__(self, name: str) -> "Any":
        if name.startswith("_acb_"):  # asked of an instance that has not been initialised, such as one being copied
            raise AttributeError(name)
        return getattr(self._acb_loader, name)

    def __reduce__(self) -> "tuple[Any, ...]":
        from copy import copy

        return copy, (self._acb_loader,)  # pickled or copied, it is a copy of the true loader

    def create_module(self, spec: "ModuleSpec") -> "ModuleType | None":
        """What the true loader creates."""
        create = getattr(self._acb_loader, "create_module", None)
        return None if create is None else create(spec)

    def exec_module(self, module: "ModuleType") -> None:
        """Run the module's code with its true loader in place, then the hooks; raises only what that code raises.

        Python holds the import lock of this one module meanwhile, so that no other thread sees it half-patched.
        """
        loader, finder, name = self._acb_loader, self._acb_finder, module.__name__
        spec = module.__spec__
        if spec is not None and spec.loader is self:  # type: ignore[comparison-overlap]
            spec.loader = loader
        if getattr(module, "__loader__", None) is self:
            module.__loader__ = loader
        finder.executing.add(name)
        try:
            loader.exec_module(module)
        finally:
            finder.executing.discard(name)  # before the hooks are listed: see register
        finder.executed(sys.modules.get(name, module))


def _hidden(code: "CodeType") -> "CodeType":
    """The same code under the import system's file name: Python then trims its frame from tracebacks and warnings."""
    return code.replace(co_filename="<frozen importlib._bootstrap>")


HookLoader.exec_module.__code__ = _hidden(HookLoader.exec_module.__code__)


def _is_acb(spec: "ModuleSpec") -> bool:
    """Whether a package named acb is this project's, of whatever version, and not the user's own."""
    return any(
        os.path.isfile(os.path.join(place, "launcher", "finder.py")) for place in spec.submodule_search_locations or ()
    )


def _initializing(module: "ModuleType") -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def installed() -> "AcbFinder | None":
    """The finder of this process, whichever copy of this file made it."""
    for finder in sys.meta_path:
        if type(finder).__name__ == AcbFinder.__name__:
            return finder  # type: ignore[return-value]
    return None


def install(home: str) -> None:
    """Put the finder first on sys.meta_path, once, and watch for the known frameworks.

    `home` is the directory that holds the package acb. A framework that is imported already is instrumented now.
    """
    if installed() is not None:
        return
    finder = AcbFinder(home)
    sys.meta_path.insert(0, finder)
    for name, module in FRAMEWORKS.items():
        finder.register(name, _installer(module, home))


def register(name: str, hook: "Hook", *, label: "str | None" = None) -> None:
    """AcbFinder.register of this process's finder; raises RuntimeError in a process without one."""
    finder = installed()
    if finder is None:
        raise RuntimeError("this process was not started by acb-launch, so acb does not watch its imports")
    finder.register(name, hook, label=label)


def _installer(module_name: str, home: str) -> "Hook":
    """A hook that imports acb's package for a framework, from `home`, and runs its ``install``."""

    def run(framework: "ModuleType") -> None:
        import importlib

        acb = importlib.import_module("acb")
        places = list(getattr(acb, "__path__", ()))
        if os.path.join(home, "acb") not in places:
            where = getattr(acb, "__file__", None) or places
            raise ImportError(f"the program has another module named acb ({where}), which hides this one in {home}")
        importlib.import_module(module_name).install(framework)

    return run
