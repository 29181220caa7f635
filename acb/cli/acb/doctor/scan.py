"""Which GPU frameworks an environment has, read from what their installers left there: nothing is imported.

Standard library only, so that any Python can run this very file: ``python scan.py`` prints the answer as JSON.
"""

from __future__ import annotations

import json
import platform
import re
import sys
import sysconfig
from importlib import metadata

TOLD_APART = {
    "torch": "PyTorch",
    "jax": "JAX",
    "tensorflow": "TensorFlow",
    "openmm": "OpenMM",
    "cupy": "CuPy",
}
"""Distributions and what people call them."""


def scan() -> dict[str, object]:
    """This interpreter and its frameworks: name, version, and ``cuda``: the CUDA version it is built for, or None.

    ``cuda`` is "" where a build is for GPUs of an unknown CUDA version, "rocm" for AMD's.
    """
    there: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower().replace("_", "-")
        there.setdefault(name, distribution)  # the first on the path is the one that gets imported
    frameworks = []
    for name, title in TOLD_APART.items():
        found = there.get(name)
        cuda = None
        if name == "torch" and found is not None:
            cuda = _torch_build(found)
        elif name == "cupy":  # its GPU builds bear the CUDA version in their name
            for other in sorted(there):
                match = re.fullmatch(r"cupy-(?:cuda(\d+)x|(rocm).*)", other)
                if match:
                    found, cuda = there[other], match[1] or match[2]
        elif found is not None:
            cuda = _plugin(there, name)
            if name == "tensorflow" and cuda is None and "+cpu" not in found.version and "nvidia-cublas-cu12" in there:
                cuda = "12"
        if found is not None:
            frameworks.append({"name": name, "title": title, "version": found.version, "cuda": cuda})
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
        "frameworks": frameworks,
    }


def _plugin(there: dict[str, metadata.Distribution], name: str) -> str | None:
    """The CUDA version of the package that adds the GPU to this one."""
    for other in sorted(there):
        match = re.fullmatch(name + r"-(?:cuda-?(\d+)(?:-plugin)?|(rocm).*)", other)
        if match:
            return match[1] or match[2]
    return None


def _torch_build(distribution: metadata.Distribution) -> str | None:
    """What PyTorch's own version.py says, read as text: a CUDA build from PyPI bears no sign in its version."""
    try:
        with open(str(distribution.locate_file("torch/version.py")), encoding="utf-8") as file:
            text = file.read()
    except OSError:
        local = distribution.version.partition("+")[2]
        match = re.match(r"cu(\d+)(\d)$", local)
        return f"{match[1]}.{match[2]}" if match else None if local in ("", "cpu") else local
    for name, result in (("cuda", None), ("hip", "rocm")):
        match = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([^'\"]*)['\"]", text, re.MULTILINE)
        if match:
            return result or match[1]
    return None


if __name__ == "__main__":
    print(json.dumps(scan()))
