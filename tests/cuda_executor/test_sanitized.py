"""With FN_SANITIZE=1: the kernel tests of this folder once more, under AddressSanitizer and UBSan."""

import os
import subprocess
import sys

import pytest
from building import HERE


def runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif("FN_SANITIZE" not in os.environ, reason="needs FN_SANITIZE=1")
@pytest.mark.parametrize("tests", sorted(path.name for path in HERE.glob("test_*_kernels.py")))
def test_kernels_under_sanitizers(tests):
    # Python is not built with a sanitizer, so the runtime must be there before it; Python itself leaks on purpose.
    environment = {
        **os.environ,
        "FN_SANITIZED": "1",
        "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / tests)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
