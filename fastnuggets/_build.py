"""Compares what the compiled module was built for with the torch that is installed."""

import json
from pathlib import Path

import torch

RECORD = Path(__file__).with_name("_build.json")


def _series(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_build(record: Path = RECORD) -> dict[str, object]:
    """Returns the build record; raises ImportError in one sentence if it does not fit the installed torch.

    The C++ interface of torch holds within a minor series: 2.13.0 and 2.13.1 fit each other, 2.14 does not. A CUDA
    build needs a torch of the same CUDA major version; a CPU build runs with any.
    """
    if not record.exists():
        raise ImportError(
            "fastnuggets has no compiled module here: build it with "
            "`python setup.py build_ext --inplace`, or install it with `pip install --no-build-isolation .`"
        )
    built: dict[str, object] = json.loads(record.read_text())
    torch_built, cuda_built = str(built["torch"]), built["cuda"]
    cuda_here = torch.version.cuda
    same_cuda = cuda_built is None or (
        cuda_here is not None and str(cuda_built).split(".")[0] == cuda_here.split(".")[0]
    )
    if _series(torch_built) != _series(torch.__version__) or not same_cuda:
        raise ImportError(
            f"fastnuggets was built for torch {torch_built} ({_name(cuda_built)}) but torch {torch.__version__} "
            f"({_name(cuda_here)}) is installed: rebuild it with "
            "`pip install --no-build-isolation --force-reinstall --no-deps .` in its source folder"
        )
    return built


def _name(cuda: object) -> str:
    return "CPU" if cuda is None else f"CUDA {cuda}"
