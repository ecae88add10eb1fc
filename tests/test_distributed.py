"""Averages over ranks: gloo on two and three processes, ranks that disagree, that die and that stop."""

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from fastnuggets.training.averaging import WeightAverager
from fastnuggets.training.distributed import DistributedAverager

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or not dist.is_available(), reason="processes of POSIX")
CASES = [("healthy", 3), ("losing", 2), ("losing", 3), ("stopping", 2)]


class Mixed(nn.Module):
    """Types, layouts and sizes that do not fit into buckets evenly."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.half = nn.Linear(7, 11, dtype=torch.bfloat16)
        self.wide = nn.Linear(3, 3, dtype=torch.float64)
        self.tied = self.wide.weight
        self.wave = nn.Parameter(torch.randn(4, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.randn(()))
        self.none = nn.Parameter(torch.empty(0))
        self.norm.running_mean.normal_()
        self.norm.num_batches_tracked.fill_(seed)


def definition(states, shares):
    """The weighted mean in double precision, integers as they were on each rank."""
    wide = {k: torch.complex128 if v.is_complex() else torch.float64 for k, v in states[0].items()}
    return {
        key: sum(share * state[key].to(wide[key]) for share, state in zip(shares, states, strict=True))
        for key, value in states[0].items()
        if value.is_floating_point() or value.is_complex()
    }


# ---- what the ranks do: each returns what the test looks at ----------------------------------------------------------


def local(rank: int, steps: int, model: nn.Module):
    """A toy regression, each rank with data of its own."""
    with torch.no_grad():
        model.weight.fill_(0.1)
        model.bias.zero_()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    generator = torch.Generator().manual_seed(rank)
    for step in range(steps):
        x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True) - rank).square().mean().backward()
        optimizer.step()
        yield step, model


def agreeing(rank: int) -> dict:
    found = {}
    for name, options, weight in (
        ("mean", {}, 1.0),
        ("small buckets", {"bucket_bytes": 40}, 1.0),
        ("weighted", {}, (1.0, 2.0, 5.0)[rank]),
        ("without rank 1", {}, (1.0, 0.0, 1.0)[rank]),
    ):
        model = Mixed(rank)
        if name == "without rank 1" and rank == 1:
            model.conv.weight.data.fill_(float("nan"))
        DistributedAverager(model, timeout=30, **options).average(weight)
        assert model.tied is model.wide.weight
        found[name] = model.state_dict()
    model = nn.Linear(4, 1, dtype=torch.float64)
    averager = DistributedAverager(model, every=3, timeout=30)
    found["averaged at"] = [step for step, _ in local(rank, 8, model) if averager.update()]
    found["local SGD"] = model.state_dict()

    weights = Mixed(rank)
    average = WeightAverager(weights, "ema", decay=[0.5, 0.9])
    average.update()
    with torch.no_grad():
        weights.scalar.add_(1)
    average.update()
    DistributedAverager(average, timeout=30).average()
    found["averages"] = [{k: v.clone() for k, v in average.average(which).items()} for which in (0, 1)]
    found["own weights"] = weights.state_dict()

    pair = dist.new_group([0, 1])
    if rank < 2:
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, float(rank))
        DistributedAverager(model, group=pair, timeout=30).average()
        found["pair"] = model.weight.detach()
    return found


def refused(call, *arguments, **options) -> str:
    try:
        call(*arguments, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def disagreeing(rank: int) -> dict:
    found = {}
    averager = DistributedAverager(nn.Linear(2, 2 + (rank == 1)), timeout=30)
    found["shape"] = refused(averager.average)
    found["again"] = refused(averager.average)
    model = nn.Linear(2, 2, bias=rank == 0, dtype=torch.float64 if rank == 2 else torch.float32)
    found["names"] = refused(DistributedAverager(model, timeout=30).average)
    model = nn.Sequential(nn.Conv2d(2, 2, 3))
    if rank == 2:
        model.to(memory_format=torch.channels_last)
    found["strides"] = refused(DistributedAverager(model, timeout=30).average)
    averager = DistributedAverager(nn.Linear(2, 2), every=2, timeout=30)
    averager.step = rank
    found["step"] = refused(lambda: [averager.update() for _ in range(2 - rank % 2)])
    averager.step = 0
    found["weights"] = refused(averager.average, 0.0) if rank != 2 else refused(averager.average, -1.0)
    found["zero"] = refused(averager.average, 0.0)
    averager.average()
    model = nn.Linear(2, 2)
    model.shards = nn.Parameter(distribute_tensor(torch.randn(5, 2), init_device_mesh("cpu", (3,)), [Shard(0)]))
    found["DTensor"] = refused(DistributedAverager, model, timeout=30)
    found["SWAG"] = refused(DistributedAverager, WeightAverager(nn.Linear(2, 2), "swag"))
    found["gaps"] = refused(DistributedAverager, nn.ParameterList([torch.randn(4, 4)[:, ::2]]), timeout=30)
    found["every"] = refused(DistributedAverager, nn.Linear(2, 2), every=0)
    return found


def healthy(rank: int, world: int) -> dict:
    return {**agreeing(rank), **disagreeing(rank)}


def losing(rank: int, world: int) -> dict:
    """The last rank dies after the first average, as by the kernel's hand."""
    model = nn.Linear(300, 300)
    averager = DistributedAverager(model, every=2, timeout=20)
    for step in range(4):
        if step == 3 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        error = refused(averager.update)
    seconds = time.monotonic() - began
    while rank == 0 and world > 2 and not Path("losing 3 1").exists():
        time.sleep(0.01)  # the store lives here, and rank 1 may be asking
    return {"error": error, "seconds": seconds}


def stopping(rank: int, world: int) -> dict:
    """Rank 0, where the store is, stands still."""
    averager = DistributedAverager(nn.Linear(3, 3), timeout=1)
    averager.update()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    began = time.monotonic()
    error = refused(averager.update)
    return {"error": error, "seconds": time.monotonic() - began}


def rank_of(name: str, world: int, port: str, rank: int) -> int:
    try:
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", address, timedelta(seconds=60), world_size=world, rank=rank)
        found = globals()[name](rank, world)
        torch.save(found, f"{name} {world} {rank}.partial")
        os.replace(f"{name} {world} {rank}.partial", f"{name} {world} {rank}")
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main(ports: "list[str]") -> None:
    """Forks the ranks of all cases: quicker than starting Python anew, and safe as long as there is no thread."""
    torch.set_num_threads(1)
    children = {}
    for (name, world), port in zip(CASES, ports, strict=True):
        for rank in range(world):
            child = os.fork()
            if not child:
                os._exit(rank_of(name, world, port, rank))  # groups with a dead member cannot be left in order
            children[name, world, rank] = child
    stopped = children.pop(("stopping", 2, 0))
    for child in children.values():
        os.waitpid(child, 0)
    os.kill(stopped, signal.SIGKILL)


# ---- the tests -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the ranks of all cases returned, by name and size of the world."""
    folder = tmp_path_factory.mktemp("ranks")
    free = [socket.create_server(("127.0.0.1", 0)) for _ in CASES]
    ports = [str(server.getsockname()[1]) for server in free]
    for server in free:
        server.close()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, __file__, *ports], cwd=folder, env=environment, timeout=100, check=True)
    return lambda name, world: [torch.load(path) for path in sorted(folder.glob(f"{name} {world} ?"))]


@pytest.fixture(scope="module")
def agreed(ranks):
    found = ranks("healthy", 3)
    assert len(found) == 3
    return found


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("mean", (1 / 3,) * 3),
        ("small buckets", (1 / 3,) * 3),
        ("weighted", (1 / 8, 2 / 8, 5 / 8)),
        ("without rank 1", (1 / 2, 0, 1 / 2)),
    ],
)
def test_all_ranks_hold_the_weighted_mean(agreed, name, shares):
    before = [Mixed(rank).state_dict() for rank in range(3)]
    for key, value in definition(before, shares).items():
        found = agreed[0][name][key]
        # One rounding to the tensor's type and three of float32 sums of numbers below 4.
        narrow = torch.finfo(found.dtype).eps / 2 * value.abs()
        assert ((found - value).abs() <= narrow + (1e-15 if found.dtype == torch.float64 else 1e-6)).all(), key
        assert found.dtype == before[0][key].dtype
        for other in agreed[1:]:
            assert torch.equal(other[name][key], found)
            assert other[name][key].stride() == before[0][key].stride()
    for rank, state in enumerate(agreed):
        assert state[name]["norm.num_batches_tracked"] == rank


def test_local_sgd_is_that_of_one_process(agreed):
    models = [nn.Linear(4, 1, dtype=torch.float64) for _ in range(3)]
    for steps in zip(*(local(rank, 8, model) for rank, model in enumerate(models)), strict=True):
        if steps[0][0] in (2, 5):
            with torch.no_grad():
                for same in zip(*(model.parameters() for model in models), strict=True):
                    mean = torch.stack(list(same)).mean(0)
                    for parameter in same:
                        parameter.copy_(mean)
    for rank, model in enumerate(models):
        assert agreed[rank]["averaged at"] == [2, 5]
        for key, value in model.state_dict().items():
            torch.testing.assert_close(agreed[rank]["local SGD"][key], value, rtol=0, atol=1e-14)
    # Two steps after the last average the ranks are apart again.
    assert not torch.equal(agreed[0]["local SGD"]["weight"], agreed[1]["local SGD"]["weight"])


def test_running_averages_are_averaged_and_the_weights_are_left(agreed):
    for which, decay in enumerate((0.5, 0.9)):
        first = torch.stack([Mixed(rank).scalar.detach().double() for rank in range(3)]).mean()
        for rank in range(3):
            assert abs(agreed[rank]["averages"][which]["scalar"] - (first + 1 - decay)) < 1e-6
            assert torch.equal(agreed[rank]["own weights"]["scalar"], Mixed(rank).scalar + 1)
            assert agreed[rank]["averages"][which]["half.weight"].dtype == torch.float32


def test_a_group_averages_for_itself(agreed):
    assert (agreed[0]["pair"] == 0.5).all() and (agreed[1]["pair"] == 0.5).all()


def test_ranks_that_disagree_are_told_about_both(agreed):
    for found in agreed:
        assert found["shape"] == found["again"]
        assert found["shape"] == (
            "ValueError: the ranks have different tensors: "
            "weight is float32 [2, 2] with strides [2, 1] on rank 0 and float32 [3, 2] with strides [2, 1] on rank 1; "
            "bias is float32 [2] with strides [1] on rank 0 and float32 [3] with strides [1] on rank 1"
        )
        assert found["names"].endswith("bias is float32 [2] with strides [1] on rank 0 and missing on rank 1")
        assert "0.weight is float32 [2, 2, 3, 3] with strides [18, 9, 3, 1] on rank 0 and" in found["strides"]
        assert found["strides"].endswith("on rank 2")
        assert found["step"] == (
            "ValueError: the ranks average at different steps: rank 0 at step 2, rank 1 at step 2, rank 2 at step 4"
        )
        assert found["weights"].endswith("one of them more; ranks [0, 1, 2] gave [0.0, 0.0, -1.0]")
        assert found["zero"].endswith("ranks [0, 1, 2] gave [0.0, 0.0, 0.0]")
        assert found["DTensor"].startswith("TypeError: shards is a DTensor")
        assert found["SWAG"].startswith("ValueError: averages over ranks are of plain averages")
        assert found["gaps"] == "ValueError: 0 must be dense, got [4, 2] with strides [4, 2]"
        assert found["every"] == "ValueError: every must be at least 1, got 0"


@pytest.mark.parametrize("world", [2, 3])
def test_a_killed_rank_is_an_error_on_the_others(ranks, world):
    found = ranks("losing", world)
    assert len(found) == world - 1
    for state in found:
        assert state["error"].startswith("RuntimeError: a rank was lost in the average at step 4: not come were ")
        assert f"rank {world - 1} (last seen at step 2)" in state["error"]
        assert state["seconds"] < 20 + 5  # at once, unless a survivor waits for another one


def test_a_rank_that_stands_still_is_an_error_in_time(ranks):
    (found,) = ranks("stopping", 2)
    assert found["error"].startswith("RuntimeError: a rank was lost in the average at step 2: ")
    assert "the store that could say which does not answer" in found["error"]
    assert 0.9 < found["seconds"] < 10


def test_without_a_group_it_says_so():
    with pytest.raises(RuntimeError, match="call init_process_group first"):
        DistributedAverager(nn.Linear(2, 2))


if __name__ == "__main__":
    main(sys.argv[1:])
