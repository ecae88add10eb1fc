"""Fast CPU and CUDA kernels for PyTorch."""

__version__ = "0.1.0"

from fastnuggets._build import check_build

check_build()

from fastnuggets import _C, interop, nn, ops  # noqa: E402

__all__ = ["__version__", "build_info", "interop", "nn", "ops"]


def build_info() -> dict[str, object]:
    """What this copy was compiled with: torch, CUDA, architectures, compiler."""
    return {**_C.build_info(), **check_build()}
