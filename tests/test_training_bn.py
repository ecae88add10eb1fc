"""fastnuggets.training.update_bn against statistics computed in two float64 passes over all activations."""

import os

import pytest
import torch
from torch import nn

from fastnuggets.training import update_bn

BATCHES = (96, 96, 96, 4)
# Measured over the models here: 5.0e-8 relative, which is float32's rounding of the result.
EXACT = {"rtol": 2.5e-7, "atol": 1e-7}


def data(*shape, batches=BATCHES):
    """Batches whose mean and spread change along the set, so that what a batch weighs matters."""
    generator = torch.Generator().manual_seed(1)
    steps = enumerate(batches)
    return [torch.randn(n, *shape, generator=generator) * (1 + i) + 3 * i for i, n in steps]


def two_pass(activations):
    """Mean and unbiased variance a channel of batches [N, C, ...], in float64."""
    x = torch.cat([a.transpose(0, 1).flatten(1) for a in activations], 1).double()
    mean = x.mean(1)
    return mean, (x - mean[:, None]).square().sum(1) / (x.size(1) - 1)


def recorded(model, layer, batches, run):
    """What reached the layer while `run` went over the batches."""
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    run()
    handle.remove()
    return seen


def assert_statistics(layer, activations):
    mean, variance = two_pass(activations)
    torch.testing.assert_close(layer.running_mean.double(), mean, **EXACT)
    torch.testing.assert_close(layer.running_var.double(), variance, **EXACT)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.BatchNorm1d(5), (5,)),
        (nn.BatchNorm1d(5), (5, 7)),
        (nn.BatchNorm2d(5), (5, 4, 3)),
        (nn.BatchNorm3d(5), (5, 2, 3, 2)),
        (nn.SyncBatchNorm(5), (5, 4, 3)),
        (type("Own", (nn.BatchNorm2d,), {})(5, momentum=None), (5, 4, 3)),
        (nn.LazyBatchNorm2d(), (5, 4, 3)),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v),
)
def test_statistics_are_the_data_sets(layer, shape, device):
    batches = data(*shape)
    layer.to(device)
    update_bn(batches, layer)
    assert_statistics(layer.cpu(), batches)
    assert layer.num_batches_tracked == len(batches)


def test_torch_weighs_a_small_batch_like_a_large_one():
    """The reason for this function: torch's is off by whole units where ours is off by rounding."""
    batches = data(3)
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    update_bn(batches, ours)
    torch.optim.swa_utils.update_bn(batches, theirs)
    mean, variance = two_pass(batches)
    assert (ours.running_mean - mean).abs().max() < 1e-6
    assert (theirs.running_mean - mean).abs().min() > 1  # measured: 1.01 to 1.73
    assert (theirs.running_var - variance).abs().min() > 1  # it knows nothing of the spread between batches


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(6, 4, 3),
        nn.BatchNorm2d(4, momentum=None),
    )


def test_every_layer_of_a_network():
    """A deeper layer's statistics are those of what reached it during the pass, with dropout off."""
    model, batches = network().train(), data(3, 9, 9, batches=(6, 6, 2))
    seen = {i: recorded(model, model[i], batches, lambda: update_bn(batches, model)) for i in (1, 5)}
    for i, activations in seen.items():
        assert len(activations) == 3
        assert_statistics(model[i], activations)
    first, second = (recorded(model, model[5], batches, lambda: update_bn(batches, model)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "dropout was on"


def test_a_batch_larger_than_is_looked_at_together():
    """Parts of one batch, the last one smaller, and weights cut like them."""
    x = data(4, 40, 40, batches=(60, 50))
    assert x[0].numel() > 1 << 18
    plain, weighted = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    update_bn(x, plain)
    assert_statistics(plain, x)
    assert plain.num_batches_tracked == 2
    update_bn(x, weighted, weight=lambda batch: torch.arange(len(batch)) % 2)
    assert_statistics(weighted, [batch[1::2] for batch in x])


def test_large_mean_does_not_cancel():
    x = [torch.randn(64, 3) * 0.1 + 1000 for _ in range(8)]
    layer = nn.BatchNorm1d(3)
    update_bn(x, layer)
    assert_statistics(layer, x)


def test_half_precision():
    """The statistics of what reached the layer, rounded once to the buffers' type."""
    layer, batches = nn.BatchNorm2d(3).bfloat16(), [x.bfloat16() for x in data(3, 4, 4)]
    update_bn(batches, layer)
    mean, variance = two_pass(batches)
    assert torch.equal(layer.running_mean, mean.bfloat16())
    assert torch.equal(layer.running_var, variance.bfloat16())


def test_autocast():
    model, batches = network(), data(3, 9, 9, batches=(6, 3))
    seen = recorded(model, model[1], batches, lambda: update_bn(batches, model, autocast=torch.bfloat16))
    assert {a.dtype for a in seen} == {torch.bfloat16}
    assert_statistics(model[1], seen)
    assert not torch.is_autocast_enabled("cpu")


def test_flags_momenta_and_frozen_layers():
    model = network().train()
    model[1].eval()
    model[3].eval()
    before = [m.training for m in model.modules()]
    momenta = model[1].momentum, model[5].momentum
    update_bn(data(3, 9, 9, batches=(6, 3)), model)
    assert [m.training for m in model.modules()] == before
    assert (model[1].momentum, model[5].momentum) == momenta == (0.1, None)
    assert not model[1]._forward_hooks
    assert not model[1]._forward_pre_hooks
    assert model[1].running_mean.count_nonzero() == 6, "a frozen layer is set too"


def test_an_overridden_train_is_not_called():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def train(self, mode=True):
            raise AssertionError("train() may do more than set flags")

        def forward(self, x):
            return self.norm(x)

    model, batches = Fused(), data(3)
    update_bn(batches, model)
    assert_statistics(model.norm, batches)


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_error_leaves_the_model_as_it_was(error):
    def failing():
        yield from data(3, 9, 9, batches=(6, 3))
        raise error("disk")

    model = network()
    model(torch.randn(4, 3, 9, 9))
    model[3].train(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    with pytest.raises(error, match="disk"):
        update_bn(failing(), model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert not model[1]._forward_pre_hooks


def test_kinds_of_batches():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x, label=None):
            return self.norm(x)

    batches = data(3)
    expected = two_pass(batches)[0].float()
    loaders = {
        "tuple": [(x, torch.zeros(len(x))) for x in batches],
        "list": [[x, 1] for x in batches],
        "dict": [{"x": x, "label": None} for x in batches],
    }
    for kind, loader in loaders.items():
        model = Named()
        update_bn(loader, model)
        torch.testing.assert_close(model.norm.running_mean, expected, **EXACT, msg=kind)
    model = Named()
    update_bn([{"image": x} for x in batches], model, forward=lambda m, b: m(b["image"]))
    torch.testing.assert_close(model.norm.running_mean, expected, **EXACT)


def test_weights_of_samples():
    """A weight is how often a sample counts: 0 leaves it out, 2 is as if it came twice."""
    generator = torch.Generator().manual_seed(2)
    loader = [(x, torch.randint(0, 3, (len(x),), generator=generator)) for x in data(3, 5)]
    layer = nn.BatchNorm1d(3)
    update_bn(loader, layer, weight=lambda batch: batch[1])
    assert_statistics(layer, [x.repeat_interleave(n, 0) for x, n in loader])
    with pytest.raises(ValueError, match=r"one number a sample, \[96\], got \[2\]"):
        update_bn(loader, layer, weight=lambda batch: torch.ones(2))


def test_a_last_batch_of_one():
    """It has no variance of its own, where torch raises; it counts all the same."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    batches = data(3, batches=(8, 8, 1))
    seen = recorded(model, model[2], batches, lambda: update_bn(batches, model))
    assert_statistics(model[0], batches)
    assert_statistics(model[2], seen)
    assert model[0].training
    with pytest.raises(ValueError, match="0: the first batch has one value a channel"):
        update_bn(batches[::-1], model)


def test_models_without_running_statistics_return_at_once():
    def never():
        raise AssertionError("the loader was asked")
        yield

    for model in (nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.InstanceNorm1d(3)):
        update_bn(never(), model)


def test_layers_that_are_not_reached_are_left_alone():
    model = network()
    model.spare = nn.BatchNorm2d(2)
    model.spare.running_mean.fill_(7)
    update_bn(data(3, 9, 9, batches=(6, 3)), model, forward=lambda m, x: m[:6](x))
    assert model.spare.running_mean.tolist() == [7, 7]
    assert model.spare.num_batches_tracked == 0


def test_errors():
    with pytest.raises(ValueError, match="gave no batch"):
        update_bn([], network())
    with pytest.raises(RuntimeError, match="no batch reached"):
        update_bn([0], network(), forward=lambda m, x: None)
    model = network()
    with pytest.raises(RuntimeError, match=r"^1: .* not finite"):
        update_bn([torch.full((2, 3, 9, 9), torch.nan)], model)
    assert model[1].running_mean.count_nonzero() == 0
    with pytest.raises(ValueError, match=r"the model: the input must be \[N, 4, ...\], got \[8, 5, 4\]"):
        update_bn([torch.zeros(8, 5, 4)], nn.BatchNorm1d(4))


def test_threads_give_the_same_bits(threads):
    found = []
    for n in (1, 2):
        threads(n)
        layer = nn.BatchNorm2d(5)
        update_bn(data(5, 16, 16), layer)
        found.append(torch.cat([layer.running_mean, layer.running_var]))
    assert torch.equal(*found)


def test_compiled_and_wrapped_models():
    model, batches = nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))), data(3)
    expected = two_pass([model[0][0](x).detach() for x in batches])[0].float()
    model[0].compile(backend="eager")
    compiled = torch.compile(nn.DataParallel(model), backend="eager")
    compiled(batches[0])  # compiled without our hooks
    update_bn(batches, compiled)
    # Measured: the same bits; another build of the product may round otherwise.
    torch.testing.assert_close(model[0][1].running_mean, expected, rtol=1e-6, atol=1e-6)


def _rank(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    batches = data(3, 5)
    group = torch.distributed.group.WORLD
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3)))
    update_bn(batches[:3] if rank == 0 else batches[3:], model, group=group)
    results = [model.module[0].state_dict()]
    alone = nn.BatchNorm1d(3)
    update_bn(batches if rank else [], alone, group=group)
    results.append(alone.state_dict())
    try:
        update_bn([torch.zeros(4, 2)] if rank else batches, alone, group=group)
    except Exception as error:
        results.append(f"{type(error).__name__}: {error}")
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # to take the group's threads down in order has been seen to hang


def test_ranks_share_a_data_set(tmp_path):
    """Uneven parts, an empty part, and one rank's error, which must not leave the other one waiting."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for shared, other in zip(first[:2], second[:2], strict=True):
        assert all(torch.equal(shared[k], other[k]) for k in shared)
        layer = nn.BatchNorm1d(3)
        layer.load_state_dict(shared)
        assert_statistics(layer, data(3, 5))
        assert layer.num_batches_tracked == 4
    assert first[2] == "RuntimeError: update_bn failed on rank 1 of the group"
    assert second[2].startswith("ValueError: the model: the input must be")
