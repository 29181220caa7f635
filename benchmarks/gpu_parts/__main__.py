"""One part in a process of its own: ``python -m benchmarks.gpu_parts NAME MODULE SETTINGS FILE`` (see playing)."""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path

from benchmarks.gpu_parts.part import Part, Settings, Skip


def main() -> int:
    """Run it; the file says what came of it, the exit status only whether it came to its end."""
    name, module, settings, file = sys.argv[1:]
    part = Part(name, Settings(**json.loads(settings)), Path(file))
    try:
        importlib.import_module(module, "benchmarks.gpu_parts").run(part)
    except Skip as skip:
        part.end("skipped", str(skip))
    except BaseException as error:
        traceback.print_exc()
        part.end("failed", f"{type(error).__name__}: {error}"[:600])
        return 1
    else:
        part.end("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
