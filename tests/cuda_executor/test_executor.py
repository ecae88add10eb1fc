"""The executor finds what it is there to find: each planted fault fails, and the same kernel without it passes."""

import subprocess

import pytest
from building import HERE, build

FAULTS = {
    "missing_barrier": "wrong result, forward order",
    "missing_second_barrier": "wrong result, forward order",
    "divergent_barrier": "no thread can go on: 32 wait at __syncthreads, 0 at a warp collective, 32 have left",
    "lane_left_out": "no thread can go on",
    "global_index_too_far": "heap-buffer-overflow",
    "static_shared_index_too_far": "index 32 out of bounds",
    "dynamic_shared_index_too_far": "heap-buffer-overflow",
    "tail_not_handled": "wrong result",
    "shared_memory_not_set": "wrong result",
}


def run(name: str, *define: str) -> subprocess.CompletedProcess:
    program = build(HERE / "faults" / f"{name}.cu", sanitize=True, shared=False, define=define)
    return subprocess.run([program], capture_output=True, text=True, check=False)


def test_every_fault_is_listed():
    assert {path.stem for path in (HERE / "faults").glob("*.cu")} == set(FAULTS) | {"collectives"}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(name):
    result = run(name, "FAULT")
    assert result.returncode != 0
    assert FAULTS[name] in result.stderr


@pytest.mark.parametrize("name", [*FAULTS, "collectives"])
def test_correct_kernel_passes(name):
    result = run(name)
    assert result.returncode == 0, result.stderr
