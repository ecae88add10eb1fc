import os
import subprocess
import sys

import pytest
import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture
def threads():
    """Sets the number of CPU threads; the number before the test comes back after it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def program():
    """Runs a test file as a program and sees that it ends well: what has a process group needs a process of its own,
    which ends at once. To take the group down in order waits for a thread that may wait for Python's lock."""

    def run(file, *arguments):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, file, *arguments]
        ended = subprocess.run(command, env=environment, timeout=100, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr

    return run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
