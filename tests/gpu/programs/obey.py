"""Programs that obey: one JSON array a line on stdin, [method, argument, ...]; one JSON object a line on stdout.

The programs themselves are ordinary users of a framework and know nothing of acb.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def obey(user: Any) -> None:
    """Do what comes, until stdin ends."""
    stdout, sys.stdout = sys.stdout, sys.stderr  # for us alone, whatever a framework prints
    print(json.dumps({"ready": os.getpid()}), file=stdout, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        try:
            answer = {"done": name, "result": getattr(user, name)(*arguments)}
        except Exception as error:
            answer = {"failed": name, "kind": type(error).__name__, "message": str(error)[:2000]}
        print(json.dumps(answer), file=stdout, flush=True)
