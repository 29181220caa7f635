"""A C++ extension of PyTorch as Python sees one, small enough for a test: with PyTorch's headers it takes a minute.

Its builtin function ``work(function, ...)`` calls ``function()`` whatever else it is given, ``get_version()`` does so
too. As with a real one, the file names PyTorch's libraries.
"""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

_SOURCE = r"""
#include <Python.h>

static PyObject *work(PyObject *self, PyObject *args, PyObject *keywords) {
    if (PyTuple_GET_SIZE(args) == 0) {
        PyErr_SetString(PyExc_TypeError, "work() needs a function");
        return NULL;
    }
    return PyObject_CallNoArgs(PyTuple_GET_ITEM(args, 0));
}

static PyMethodDef methods[] = {
    {"work", (PyCFunction)(void (*)(void))work, METH_VARARGS | METH_KEYWORDS, "work(function, ...): call it"},
    {"get_version", (PyCFunction)(void (*)(void))work, METH_VARARGS | METH_KEYWORDS, NULL},
    {NULL, NULL, 0, NULL}};

static PyMethodDef inner_methods[] = {
    {"work", (PyCFunction)(void (*)(void))work, METH_VARARGS | METH_KEYWORDS, NULL}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "NAME", NULL, -1, methods};
static struct PyModuleDef inner_definition = {PyModuleDef_HEAD_INIT, "NAME.inner", NULL, -1, inner_methods};

PyMODINIT_FUNC PyInit_NAME(void) {
    PyObject *module = PyModule_Create(&definition);
    PyObject *inner = PyModule_Create(&inner_definition);
    if (module == NULL || inner == NULL || PyModule_AddObject(module, "inner", inner) < 0) return NULL;
    PyObject *math = PyImport_ImportModule("math");
    PyModule_AddObject(module, "sqrt", PyObject_GetAttrString(math, "sqrt"));
    return module;
}
"""


def build(directory: Path, name: str, *libraries: str) -> Path:
    """Compile the extension `name`, linked against stand-ins for these libraries, such as ``libtorch_python.so``."""
    headers = Path(sysconfig.get_paths()["include"])
    if shutil.which("gcc") is None or not (headers / "Python.h").exists():
        pytest.skip("compiling an extension takes gcc and Python's headers")
    source = directory / f"{name}.c"
    source.write_text(_SOURCE.replace("NAME", name))
    made = directory / f"{name}.so"
    for library in libraries:
        empty = directory / "empty.c"
        empty.write_text("")
        _gcc("-shared", "-o", directory / library, empty, f"-Wl,-soname,{library}")
    paths = [directory / library for library in libraries]
    _gcc(
        "-shared", "-fPIC", "-o", made, source, f"-I{headers}", "-Wl,--no-as-needed", f"-Wl,-rpath,{directory}", *paths
    )
    return made


def _gcc(*arguments: object) -> None:
    subprocess.run(["gcc", *map(str, arguments)], check=True, timeout=60)
