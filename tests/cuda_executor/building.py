"""Compiles kernels files with g++ and the stand-in for the CUDA runtime, once per change of a source."""

import ctypes
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
BUILD = HERE / "build"

SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC"]


def _newest(sources: tuple[Path, ...]) -> float:
    headers = [path for root in (CSRC, HERE) for path in root.rglob("*") if path.suffix in {".h", ".cuh"}]
    return max(path.stat().st_mtime for path in (*sources, *headers, Path(__file__)))


def build(
    *sources: Path, sanitize: bool, shared: bool, define: tuple[str, ...] = (), flags: tuple[str, ...] = ()
) -> Path:
    """Returns the program, or the shared library, made from source files and named after the first."""
    name = "-".join([sources[0].stem, *define, *(["sanitized"] if sanitize else []), *(f.lstrip("-") for f in flags)])
    target = BUILD / (name + ".so" if shared else name)
    if target.exists() and target.stat().st_mtime > _newest(sources):
        return target
    BUILD.mkdir(exist_ok=True)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    command = [os.environ.get("CXX", "g++"), *FLAGS, *flags, *(SANITIZERS * sanitize), *(["-shared"] * shared)]
    command += [f"-D{name}" for name in define] + [f"-I{HERE / 'shim'}", f"-I{CSRC}", "-x", "c++", *map(str, sources)]
    result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{sources[0].name} does not compile:\n{result.stderr}")
    unfinished.rename(target)
    return target


def load(*sources: Path, functions: Iterable[str]) -> ctypes.CDLL:
    """The library of a driver; `functions` return what went wrong, or None. With sanitizers if FN_SANITIZED is set."""
    library = ctypes.CDLL(build(*sources, sanitize="FN_SANITIZED" in os.environ, shared=True))
    for name in functions:
        getattr(library, name).restype = ctypes.c_char_p
    return library


def both_orders(kernels: Callable[[], ctypes.CDLL]) -> object:
    """A fixture that runs each test of a module with a block's threads in order, and in reversed order."""

    @pytest.fixture(params=[False, True], ids=["forward_order", "reversed_order"], autouse=True)
    def thread_order(request):
        kernels().set_thread_order(int(request.param))
        yield request.param
        kernels().set_thread_order(0)

    return thread_order
