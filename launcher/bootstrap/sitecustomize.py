"""Let acb into a Python process that acb-launch started, then make way for the user's own sitecustomize.

Python imports this file at start-up because acb-launch put its directory at the head of PYTHONPATH. It runs in every
Python below the launcher, wanted or not, hence the rules here: syntax that any Python reads, no import that start-up
has not done already, nothing on stdout, and no exception of its own. PYTHONPATH stays as it is for the children's sake;
only sys.path loses the directory, so that the program sees the path it would have seen.
"""
# ruff: noqa: UP032, UP036 (the program's Python may be any)

import os
import sys

try:
    _here = os.path.dirname(__file__)
    sys.path[:] = [_entry for _entry in sys.path if _entry != _here]
    sys.path_importer_cache.pop(_here, None)
    if os.environ.get("ACB_DISABLE", "0") in ("", "0") and not any(
        type(_finder).__name__ == "AcbFinder" for _finder in sys.meta_path
    ):
        if sys.version_info >= (3, 10):
            # The import system's own loader: bytecode is cached, and neither importlib.util nor sys.path is needed.
            import _frozen_importlib
            import _frozen_importlib_external

            _launcher = os.path.dirname(_here)
            _spec = _frozen_importlib_external.spec_from_file_location(
                "acb.launcher.finder", os.path.join(_launcher, "finder.py")
            )
            _module = _frozen_importlib.module_from_spec(_spec)  # type: ignore[arg-type]
            _spec.loader.exec_module(_module)  # type: ignore[union-attr]
            _module.install(os.path.dirname(os.path.dirname(_launcher)))
        elif not os.environ.get("ACB_QUIET") and not os.environ.get("ACB_OLD_PYTHON"):
            os.environ["ACB_OLD_PYTHON"] = "1"  # children need not say it again
            sys.stderr.write(
                "acb: process {} runs Python {}.{}; acb needs 3.10 or newer, so the program runs without it\n".format(
                    os.getpid(), sys.version_info[0], sys.version_info[1]
                )
            )
except KeyboardInterrupt:
    raise
except BaseException as _error:  # SystemExit too: it would end the program before it began
    try:
        if not os.environ.get("ACB_QUIET"):
            sys.stderr.write(
                "acb: process {} runs without acb: {}: {}\n".format(os.getpid(), type(_error).__name__, _error)
            )
    except Exception:
        pass

# The same import again, on the path without this directory, and bare: whatever the user's own sitecustomize does, be it
# to be missing or to raise, must reach Python's site module exactly as it would have without acb.
sys.modules.pop(__name__, None)
import sitecustomize  # type: ignore[import-not-found]  # noqa: E402, F401
