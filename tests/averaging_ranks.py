"""What each process of test_averaging.test_shards does: models cut into uneven shards, or copied by DDP."""

import multiprocessing
import tempfile
import time
from datetime import timedelta

import torch
from torch import nn

LIMIT = 60  # seconds
ROWS = 5  # of each weight: uneven on two ranks, and one rank of three has fewer


def run_ranks(world):
    # One process imports torch; the ranks are its forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["averaging_ranks", "torch.distributed.fsdp", "fastnuggets.training.averaging"])
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=check, args=(rank, world, f"{folder}/store")) for rank in range(world)]
        for process in ranks:
            process.start()
        until = time.monotonic() + LIMIT
        for process in ranks:
            process.join(max(0.0, until - time.monotonic()))
        hung = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
        assert not hung, f"ranks {hung} did not end within {LIMIT} s"
        assert [process.exitcode for process in ranks] == [0] * world


def check(rank, world, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{path}", rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT / 2)
    )
    for make in (fsdp, sharded):
        for mode in ("swa", "ema", "swag"):
            check_averages(make, mode, rank)
        check_state(make)
        check_nonfinite(make, rank)
    check_eval_frees_gathered_weights()
    check_stochastic_shards_draw_their_own(rank)
    check_ddp(rank)
    torch.distributed.destroy_process_group()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, ROWS), nn.Linear(ROWS, 1, bias=False))


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (torch.distributed.get_world_size(),))


def fsdp():
    from torch.distributed.fsdp import fully_shard

    return fully_shard(net(), mesh=mesh())


def sharded():
    """DTensors by hand: one is cut along its columns, one is on all ranks."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    model, placements = net(), {"0.weight": Shard(1), "0.bias": Replicate(), "1.weight": Shard(0)}
    for name, p in list(model.named_parameters()):
        module, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        setattr(module, leaf, nn.Parameter(distribute_tensor(p.detach(), mesh(), [placements[name]])))
    return model


def drift(model, seed):
    """The same step on every rank, whatever it holds."""
    from fastnuggets.training.tensors import to_raw

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            to_raw(p, p).add_(to_raw(torch.randn(p.shape, generator=generator), p))


def averager(model, mode, **options):
    from fastnuggets.training.averaging import WeightAverager

    return WeightAverager(model, mode, **({"decay": 0.9} if mode == "ema" else {}), **options)


def check_averages(make, mode, rank):
    """The same bits as of the whole model in one process, before and after gathering, in the model and out."""
    model, whole = make(), net()
    ours, wanted = averager(model, mode), averager(whole, mode)
    for step in range(5):
        drift(model, step)
        drift(whole, step)
        assert ours.update() and wanted.update()
    found = ours.full_state_dict(everywhere=True)
    for name, value in wanted.averages.items():
        assert torch.equal(found[name], value), (mode, name)
    assert bool(ours.full_state_dict()) == (rank == 0)
    live = {name: p.full_tensor() for name, p in model.named_parameters()}
    with ours.swapped():
        for name, p in model.named_parameters():
            assert torch.equal(p.full_tensor(), found[name]), (mode, name)
        if mode == "swag":
            ours.sample(1)
            assert not torch.equal(model[0].bias.full_tensor(), found["0.bias"])
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), live[name]), (mode, name)
    into = net()
    ours.copy_to(into)
    assert torch.equal(into[0].weight, found["0.weight"])


def check_state(make):
    """States go from shards to shards, and averages from whole tensors to shards."""
    model = make()
    ours, other = averager(model, "swag", rank=3), averager(make(), "swag", rank=3)
    for step in range(4):
        drift(model, step)
        ours.update()
    other.load_state_dict(ours.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(_whole(value), _whole(other.state_dict()[key])), key
    plain = averager(make(), "ema")
    plain.load_averages(ours.full_state_dict(everywhere=True), count=4)
    assert torch.equal(plain.averages["0.weight"].full_tensor(), ours.averages["0.weight"].full_tensor())


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def check_nonfinite(make, rank):
    """One bad shard, and every rank leaves the update out."""
    model = make()
    ours = averager(model, "ema", nonfinite="skip")
    assert ours.update()
    if rank == 0:
        model[0].weight.to_local().data.view(-1)[0] = float("nan")
    assert not ours.update()
    assert ours.count == 1


def check_eval_frees_gathered_weights():
    """After a forward FSDP2 keeps the root's gathered weights: neither an update nor a swap may see or leave those."""
    model = fsdp()
    ours = averager(model, "ema")
    x = torch.randn(2, 7)
    assert ours.update()
    drift(model, 1)
    with torch.no_grad():
        before = model(x)
        with ours.swapped():
            averaged = model(x)
        assert torch.equal(model(x), before)
        assert not torch.equal(averaged, before)
        assert ours.update()


def check_stochastic_shards_draw_their_own(rank):
    """Shards must not all round alike, and copies must."""
    from fastnuggets.training.tensors import stream

    model = sharded()
    own = torch.tensor([stream(name, p) for name, p in model.named_parameters()])
    first = own.clone()
    torch.distributed.broadcast(first, 0)
    same = (own == first).tolist()
    assert same == [True] * 3 if rank == 0 else same == [False, True, False]


def check_ddp(rank):
    """Names have no prefix, and all ranks average the same."""
    bare = net()
    model = nn.parallel.DistributedDataParallel(bare)
    ours, optimizer = averager(model, "ema"), torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 7, generator=torch.Generator().manual_seed(10 * step + rank))).sum().backward()
        optimizer.step()
        ours.update()
    assert ours.averages.keys() == dict(bare.named_parameters()).keys()
    found = ours.averages["0.weight"].clone()
    torch.distributed.broadcast(found, 0)
    assert torch.equal(found, ours.averages["0.weight"])
