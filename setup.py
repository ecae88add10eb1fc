"""Builds fastnuggets._C against the torch that is installed; metadata and sdist need no torch.

Environment: FORCE_CUDA=1, FORCE_CPU=1, TORCH_CUDA_ARCH_LIST, MAX_JOBS, DEBUG=1; WERROR=1 makes every warning an error.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

os.chdir(Path(__file__).parent)  # the globs below are relative to it

try:
    import torch
except ModuleNotFoundError:
    torch = None

OLDEST_TORCH = (2, 10)
# No -march=native: a wheel must run on any x86-64 or Arm machine. No -ffast-math: it changes what inf and NaN mean.
CXX_FLAGS = ["-std=c++20", "-Wall", "-Wextra", "-fvisibility=hidden", "-fopenmp"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
NVCC_FLAGS = ["-std=c++20", "-lineinfo", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra,-fvisibility=hidden"]


def flag(name):
    return os.environ.get(name, "0") not in ("", "0")


def locate_cuda():
    """Sets CUDA_HOME from nvcc's own word: what torch makes of its path is wrong if that is a link or a script."""
    nvcc = shutil.which("nvcc")
    if nvcc and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
        if top := re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.MULTILINE):
            os.environ["CUDA_HOME"] = os.path.realpath(top[1])


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


def architectures():
    visible = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    # The last resort is what every supported nvcc can build; its PTX runs on newer GPUs.
    return os.environ.get("TORCH_CUDA_ARCH_LIST") or ";".join(f"{a}.{b}" for a, b in visible) or "8.0;9.0+PTX"


def version():
    base = re.search(r'__version__ = "(.+)"', Path("fastnuggets/__init__.py").read_text())[1]
    if torch is None or "sdist" in sys.argv:
        return base
    major, minor = torch.__version__.split(".")[:2]
    device = "cu" + torch.version.cuda.replace(".", "") if with_cuda() else "cpu"
    return f"{base}+pt{major}{minor}{device}"


def system_includes(extension):
    """Moves the headers of torch and CUDA to -isystem: we answer for our own warnings. Kernels see no torch at all."""
    extension.extra_compile_args["cxx"] += [arg for path in extension.include_dirs for arg in ("-isystem", path)]
    extension.include_dirs = [str(Path("csrc").resolve())]
    return extension


def extension():
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    cuda = with_cuda()
    sources = sorted(glob("csrc/**/*.cpp", recursive=True))
    if not cuda:
        sources = [s for s in sources if not s.endswith("_cuda.cpp")]
    kernels = sorted(glob("csrc/**/*.cu", recursive=True)) if cuda else []
    macros = [("FN_WITH_CUDA", None)] if cuda else []
    mode = ["-O0", "-g", "-UNDEBUG"] if flag("DEBUG") else ["-O3", "-g0", "-DNDEBUG"]
    strict = flag("WERROR")
    compile_args = {
        "cxx": CXX_FLAGS + mode + strict * ["-Werror"],
        "nvcc": NVCC_FLAGS + mode[:1] + strict * ["-Werror", "all-warnings", "-Xcompiler", "-Werror"],
    }
    make = CUDAExtension if cuda else CppExtension
    return system_includes(
        make("fastnuggets._C", sources + kernels, define_macros=macros, extra_compile_args=compile_args)
    )


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class BuildAndRecord(BuildExtension):
        """Leaves beside the module the facts that fastnuggets compares with the installed torch at import."""

        def finalize_options(self):
            super().finalize_options()
            if self.editable_mode:
                # pip gives a temporary folder, where every build would be the first.
                self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

        def run(self):
            if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
                sys.exit(f"fastnuggets needs torch >= {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}, found {torch.__version__}")
            cuda = with_cuda()
            if cuda:
                os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()
            super().run()
            record = {
                "version": self.distribution.get_version(),
                "torch": torch.__version__,
                "cuda": torch.version.cuda if cuda else None,
                "archs": architectures() if cuda else None,
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
            # From an sdist pip builds in a temporary folder, which is of no use in a command.
            source = "fastnuggets" if Path("PKG-INFO").exists() else Path.cwd()
            sys.exit(
                "fastnuggets is compiled against the installed torch, and this build sees none. Run:\n"
                f"  {sys.executable} -m pip install 'torch>=2.10' 'setuptools>=77' wheel ninja\n"
                f"  {sys.executable} -m pip install --no-build-isolation {source}"
            )

    return TorchIsMissing


if torch is None:
    from setuptools import Extension

    # An extension without sources still marks the wheel as compiled, so that building one reaches the message.
    setup(version=version(), ext_modules=[Extension("fastnuggets._C", [])], cmdclass={"build_ext": torch_is_missing()})
else:
    locate_cuda()
    setup(version=version(), ext_modules=[extension()], cmdclass={"build_ext": build_command()})
