"""Builds fastnuggets._C against the torch that is installed; metadata and sdist need no torch.

Environment: FORCE_CUDA=1, FORCE_CPU=1, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1.
"""

import json
import os
import re
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

os.chdir(Path(__file__).parent)  # the globs below are relative to it

try:
    import torch
except ImportError:
    torch = None

WARNINGS = ["-Wall", "-Wextra", "-Werror"]
# No -march=native: a wheel must run on any x86-64 or Arm machine. No -ffast-math: it changes what inf and NaN mean.
CXX_FLAGS = ["-std=c++20", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
NVCC_FLAGS = ["-std=c++20", "--expt-relaxed-constexpr", "-lineinfo", "-Xptxas", "-v"]


def flag(name):
    return os.environ.get(name, "0") not in ("", "0")


def with_cuda():
    from torch.utils.cpp_extension import CUDA_HOME

    if flag("FORCE_CPU"):
        return False
    if flag("FORCE_CUDA"):
        if not torch.version.cuda or not CUDA_HOME:
            missing = "a CUDA toolkit (nvcc)" if torch.version.cuda else "a CUDA build of torch"
            sys.exit(f"fastnuggets: FORCE_CUDA=1 needs {missing}, and none was found")
        return True
    return bool(torch.version.cuda and CUDA_HOME)


def version():
    base = re.search(r'__version__ = "(.+)"', Path("fastnuggets/__init__.py").read_text())[1]
    if torch is None or "sdist" in sys.argv:
        return base
    major, minor = torch.__version__.split(".")[:2]
    device = "cu" + torch.version.cuda.replace(".", "") if with_cuda() else "cpu"
    return f"{base}+pt{major}{minor}{device}"


def system_includes(extension):
    """Moves torch's and CUDA's headers to -isystem, so that warnings are errors in our files only."""
    foreign = [arg for path in extension.include_dirs for arg in ("-isystem", path)]
    extension.include_dirs = [str(Path("csrc").resolve())]
    for flags in extension.extra_compile_args.values():
        flags += foreign
    return extension


def extension():
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    cuda = with_cuda()
    sources = sorted(glob("csrc/**/*.cpp", recursive=True))
    if not cuda:
        sources = [s for s in sources if not s.endswith("_cuda.cpp")]
    kernels = sorted(glob("csrc/**/*.cu", recursive=True)) if cuda else []
    mode = ["-O0", "-g", "-UNDEBUG"] if flag("DEBUG") else ["-O3", "-g0"]
    macros = [("FN_WITH_CUDA", None)] if cuda else []
    compile_args = {
        "cxx": [*CXX_FLAGS, *mode, *WARNINGS, "-fvisibility=hidden"],
        "nvcc": [*NVCC_FLAGS, "-O0" if flag("DEBUG") else "-O3", "-Xcompiler", "-Wall,-Wextra,-fvisibility=hidden"],
    }
    make = CUDAExtension if cuda else CppExtension
    return system_includes(
        make("fastnuggets._C", sources + kernels, define_macros=macros, extra_compile_args=compile_args)
    )


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class BuildAndRecord(BuildExtension):
        """Leaves beside the module the facts that fastnuggets compares with the installed torch at import."""

        def run(self):
            super().run()
            record = {
                "version": self.distribution.get_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda if with_cuda() else None,
                "archs": os.environ.get("TORCH_CUDA_ARCH_LIST", "visible devices") if with_cuda() else None,
                "compiler": " ".join(map(str, self._check_abi())),
                "debug": flag("DEBUG"),
            }
            path = Path(self.get_ext_fullpath("fastnuggets._C")).with_name("_build.json")
            path.write_text(json.dumps(record, indent=2) + "\n")

    return BuildAndRecord


def torch_is_missing():
    from setuptools.command.build_ext import build_ext

    class TorchIsMissing(build_ext):
        def run(self):
            sys.exit(
                "fastnuggets is compiled against the torch that is installed, and this Python has none. Run:\n"
                f"  {sys.executable} -m pip install 'torch>=2.10' setuptools wheel ninja pybind11\n"
                f"  {sys.executable} -m pip install --no-build-isolation {Path.cwd()}"
            )

    return TorchIsMissing


if torch is None:
    from setuptools import Extension

    # An extension without sources still marks the wheel as compiled, so that building one reaches the message.
    setup(version=version(), ext_modules=[Extension("fastnuggets._C", [])], cmdclass={"build_ext": torch_is_missing()})
else:
    setup(version=version(), ext_modules=[extension()], cmdclass={"build_ext": build_command()})
