"""Averages of weights: our kernels, the classes users take instead, and the memory they all wait for."""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Contender, Gate, Group, Missing
from fastnuggets import ops
from fastnuggets.training import WeightAverager

DECAY = 0.999
RANK = 20
# Of one update in float32, relative to the largest weight; half types are rounded once.
TOLERANCE = {torch.float32: 3e-7, torch.bfloat16: 2**-8}


class Bag(nn.Module):
    """A model that has parameters and nothing else."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        for i, tensor in enumerate(tensors):
            self.register_parameter(f"p{i}", nn.Parameter(tensor, requires_grad=False))


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of its 161 parameters, 25.6 M numbers."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, inside, 1, 1)] if block == 0 else []
            for shape in convolutions:
                shapes += [shape, shape[:1], shape[:1]]
            inside = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def vit_base() -> list[tuple[int, ...]]:
    """Shapes of its 152 parameters, 86.6 M numbers."""
    block = [(768,), (768,), (2304, 768), (2304,), (768, 768), (768,), (768,), (768,), (3072, 768), (3072,)]
    block += [(768, 3072), (768,)]
    ends = [(768,), (768,), (1000, 768), (1000,)]
    return [(1, 1, 768), (1, 197, 768), (768, 3, 16, 16), (768,), *block * 12, *ends]


TINY: list[tuple[int, ...]] = [(64,)] * 2000


class Case:
    """Weights of these shapes and where their averages start."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: str, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.start = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        self.weights = [torch.randn(s, generator=generator).to(device, dtype) for s in shapes]
        self.model = Bag(self.weights)
        self.dtype = dtype

    def averages(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [t.to(dtype or self.dtype, copy=True) for t in self.start]

    def error(self, decay: float = DECAY, steps: int = 1) -> Callable[[Sequence[Tensor]], float]:
        """Of averages that made so many steps, over the largest weight; every twentieth tensor is looked at."""

        def error(averages: Sequence[Tensor]) -> float:
            worst = 0.0
            for start, w, a in list(zip(self.start, self.weights, averages, strict=True))[::20]:
                expected = w.double() + (start.double() - w.double()) * decay**steps
                worst = max(worst, ((a.double() - expected).abs().max() / w.abs().max()).item())
            return worst

        return error

    def contender(
        self,
        name: str,
        update: Callable[[], Any],
        averages: Callable[[], Sequence[Tensor]],
        against: str | None,
        *,
        repeat: int = 1,
        decay: float = DECAY,
        tolerance: float | None = None,
        note: str = "",
    ) -> Contender:
        """Runs `update` so often and returns what the averages became."""

        def run() -> Sequence[Tensor]:
            for _ in range(repeat):
                update()
            return averages()

        tolerance = TOLERANCE[self.dtype] if tolerance is None else tolerance
        return Contender(name, run, self.error(decay, repeat), tolerance * math.sqrt(repeat), against, repeat, note)


# --- one update -------------------------------------------------------------------------------------------------------


def update_group(title: str, case: Case, repeat: int = 1) -> Iterator[Contender | Missing]:
    """EMA of one set of float32 weights."""
    ours, how = f"ours, {title}", {"repeat": repeat}
    averages = case.averages()
    plan = ops.AveragePlan(averages, case.weights)
    yield case.contender(ours, lambda: plan.ema_(DECAY), lambda: averages, None, **how)
    averager = WeightAverager(case.model, mode="ema", decay=DECAY)
    averager.update()  # the first one copies
    averager_values = list(averager.averages.values())
    with torch.no_grad():
        for a, start in zip(averager_values, case.start, strict=True):
            a.copy_(start)
    yield case.contender(f"ours, WeightAverager, {title}", averager.update, lambda: averager_values, ours, **how)
    flat = torch.cat([t.flatten() for t in case.start]), torch.cat([t.flatten() for t in case.weights])
    floor = partial(flat[0].lerp_, flat[1], 1 - DECAY)
    sizes = [t.numel() for t in case.start]
    parts = [p.view_as(t) for p, t in zip(flat[0].split(sizes), case.start, strict=True)]
    yield case.contender(f"floor: lerp_ of two flat arrays, {title}", floor, lambda: parts, ours, **how)
    lists = case.averages()
    foreach = partial(torch._foreach_lerp_, lists, case.weights, 1 - DECAY)
    yield case.contender(f"torch._foreach_lerp_ of ready lists, {title}", foreach, lambda: lists, ours, **how)
    for name, make in PEERS.items():
        try:
            update, values = make(case)
        except ImportError as error:
            yield Missing(name, str(error).splitlines()[0])
            continue
        yield case.contender(f"{name}, {title}", update, values, ours, **how)


Peer = tuple[Callable[[], Any], Callable[[], Sequence[Tensor]]]


def _started(module: nn.Module, case: Case) -> Callable[[], Sequence[Tensor]]:
    """Sets a peer's averages to where ours start."""
    parameters = [p.data for p in module.parameters()]
    for p, start in zip(parameters, case.start, strict=True):
        p.copy_(start)
    return lambda: parameters


def averaged_model(case: Case) -> Peer:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    peer = AveragedModel(case.model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    peer.n_averaged += 1  # the first update copies
    return lambda: peer.update_parameters(case.model), _started(peer.module, case)


def averaged_model_lightning(case: Case) -> Peer:
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

    peer = AveragedModel(case.model, avg_fn=get_ema_avg_fn(DECAY))
    peer.n_averaged += 1
    return lambda: peer.update_parameters(case.model), _started(peer.module, case)


def _timm() -> Any:
    # timm's package imports torchvision; this file of it needs torch alone.
    package = importlib.util.find_spec("timm")
    if package is None or not package.submodule_search_locations:
        raise ImportError("No module named 'timm'")
    path = Path(package.submodule_search_locations[0]) / "utils" / "model_ema.py"
    spec = importlib.util.spec_from_file_location("timm_model_ema", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"timm has no {path.name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timm_v3(case: Case, **how: Any) -> Peer:
    peer = _timm().ModelEmaV3(case.model, decay=DECAY, foreach=True, **how)
    return lambda: peer.update(case.model), _started(peer.module, case)


def ema_pytorch(case: Case, **how: Any) -> Peer:
    from ema_pytorch import EMA

    options = {"beta": DECAY, "update_after_step": -1, "update_every": 1, "use_foreach": True, "inv_gamma": 1e-9}
    peer = EMA(case.model, include_online_model=False, **{**options, **how})
    peer.update()  # its first update copies
    values = _started(peer.ema_model, case)

    def update() -> None:
        peer.online_model[0] if isinstance(peer.online_model, list) else peer.online_model
        peer.update()

    return update, values


PEERS: dict[str, Callable[[Case], Peer]] = {
    "torch AveragedModel, multi_avg_fn": averaged_model,
    "torch AveragedModel, avg_fn (Lightning's EMA)": averaged_model_lightning,
    "timm ModelEmaV3": timm_v3,
    "ema-pytorch, foreach": ema_pytorch,
}


def host_group(device: str) -> Iterator[Contender | Missing]:
    yield from update_group("161 tensors of one number", Case([(1,)] * 161, device), repeat=20)


# --- half types, several averages, other operations -------------------------------------------------------------------


def bfloat16_group(device: str) -> Iterator[Contender | Missing]:
    case = Case(resnet50(), device, torch.bfloat16)
    ours = "ours, float32 average"
    single = case.averages(torch.float32)
    plan = ops.AveragePlan(single, case.weights)
    yield case.contender(ours, lambda: plan.ema_(DECAY), lambda: single, None, tolerance=3e-7, note="10 B an element")
    high, low = case.averages(), [torch.zeros(t.shape, dtype=torch.int16, device=device) for t in case.start]
    exact = ops.AveragePlan(high, case.weights, rounding="compensated", remainders=low)
    name = "ours, bfloat16 and its remainder"
    yield case.contender(name, lambda: exact.ema_(DECAY), lambda: high, ours, note="exact; 10 B an element")
    noisy = case.averages()
    stochastic = ops.AveragePlan(noisy, case.weights, rounding="stochastic")
    rounded = "ours, bfloat16, stochastic rounding"
    either_way = 2**-7  # stochastic rounding goes to either neighbour
    yield case.contender(
        rounded, lambda: stochastic.ema_(DECAY), lambda: noisy, ours, tolerance=either_way, note="6 B an element"
    )
    lists = case.averages()
    foreach = partial(torch._foreach_lerp_, lists, case.weights, 1 - DECAY)
    note = "stands still at decays near 1"
    yield case.contender("torch._foreach_lerp_, bfloat16", foreach, lambda: lists, ours, note=note)
    for name, make, against in (
        ("timm ModelEmaV3, bfloat16 with stochastic rounding", timm_v3, rounded),
        ("timm ModelEmaV3, float32", partial(timm_v3, dtype=torch.float32), ours),
    ):
        try:
            update, values = make(case)
        except (ImportError, TypeError) as error:
            yield Missing(name, str(error).splitlines()[0])
            continue
        yield case.contender(name, update, values, against, tolerance=either_way)


def passes_group(device: str) -> Iterator[Contender | Missing]:
    """More than one quantity in a pass over the weights."""
    case = Case(resnet50(), device)
    decays = (0.9, 0.99, DECAY)
    together = [case.averages() for _ in decays]
    plan = ops.AveragePlan(together, case.weights)
    ours = "ours, 3 decays in one pass"
    yield case.contender(ours, lambda: plan.ema_(decays), lambda: together[-1], None)
    apart = [case.averages() for _ in decays]

    def foreach() -> None:
        for averages, decay in zip(apart, decays, strict=True):
            torch._foreach_lerp_(averages, case.weights, 1 - decay)

    yield case.contender("3 times torch._foreach_lerp_", foreach, lambda: apart[-1], ours)
    yield from optimizer_rows(case)
    yield from swap_rows(case)


def optimizer_rows(case: Case) -> Iterator[Contender]:
    grads = [torch.randn_like(w) for w in case.weights]
    ours = "ours, SGD and EMA in one pass"
    weights, momentum, averages = case.averages(), [torch.zeros_like(w) for w in grads], case.averages()

    def fused() -> Any:
        ops.sgd_ema_step_(weights, grads, momentum, averages, lr=1e-3, decay=DECAY, momentum_rate=0.9)
        return weights

    def error(stepped: Sequence[Tensor]) -> float:
        expected = case.start[0].double() - 1e-3 * grads[0].double()
        return ((stepped[0].double() - expected).abs().max() / expected.abs().max()).item()

    yield Contender(ours, fused, error)
    for name, how in (("fused", {"fused": True}), ("foreach", {"foreach": True})):
        parameters = [nn.Parameter(w) for w in case.averages()]
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, **how)
        after = case.averages()

        def apart(
            optimizer: torch.optim.SGD = optimizer, after: list[Tensor] = after, parameters: list[Any] = parameters
        ) -> Any:
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(after, parameters, 1 - DECAY)
            return [p.detach() for p in parameters]

        yield Contender(f"torch SGD {name}, then _foreach_lerp_", apart, error, against=ours)


def swap_rows(case: Case) -> Iterator[Contender]:
    ours = "ours, swap of weights and averages"
    first, second = case.averages(), [w.clone() for w in case.weights]

    def swap() -> Any:
        ops.swap_(first, second)
        return first

    def error(swapped: Sequence[Tensor]) -> float:
        return max((a - w).abs().max().item() for a, w in zip(swapped, case.weights, strict=True))

    yield Contender(ours, swap, error, 0.0)
    third, fourth = case.averages(), [w.clone() for w in case.weights]

    def copies() -> Any:
        kept = [t.clone() for t in third]
        torch._foreach_copy_(third, fourth)
        torch._foreach_copy_(fourth, kept)
        return third

    yield Contender("clone and two copies", copies, error, 0.0, against=ours)


def swag_group(device: str) -> Iterator[Contender | Missing]:
    """The last 20 deviations of ResNet-50 collected, and samples of 8.4 M weights drawn."""
    yield from itertools.islice(swag_rows(resnet50(), device), 2)
    yield from itertools.islice(swag_rows([(1024, 1024)] * 8, device), 2, None)


def swag_rows(shapes: Sequence[tuple[int, ...]], device: str) -> Iterator[Contender]:
    """Two that collect and two that draw."""
    case = Case(shapes, device)
    zeros = [torch.zeros_like(w) for w in case.weights]
    mean, m2 = [z.clone() for z in zeros], zeros
    rings = [torch.zeros(RANK, *w.shape, device=device) for w in case.weights]
    collected = 0

    def collect() -> Sequence[Tensor]:
        nonlocal collected
        ops.swag_update_(mean, m2, case.weights, collected, deviations=rings, row=collected % RANK)
        collected += 1
        return mean

    def mean_error(means: Sequence[Tensor]) -> float:
        return max((m - w).abs().max().item() for m, w in zip(means, case.weights, strict=True))

    ours, drawn = f"ours, SWAG collect, K = {RANK}", f"ours, SWAG sample, K = {RANK}"
    yield Contender(ours, collect, mean_error)
    means, squares = [torch.zeros_like(w) for w in case.weights], [torch.zeros_like(w) for w in case.weights]
    rows = [torch.zeros(RANK, w.numel(), device=device) for w in case.weights]
    count = 0

    def collect_by_cat() -> Sequence[Tensor]:
        # What the authors' collect_model does: two running moments, and all rows moved up for each new one.
        nonlocal count
        for i, w in enumerate(case.weights):
            means[i] = means[i] * (count / (count + 1)) + w / (count + 1)
            squares[i] = squares[i] * (count / (count + 1)) + w**2 / (count + 1)
            rows[i] = torch.cat((rows[i], (w - means[i]).view(1, -1)), 0)[1:]
        count += 1
        return means

    yield Contender("SWAG collect as its authors do, torch.cat", collect_by_cat, mean_error, against=ours)
    out = [torch.empty_like(w) for w in case.weights]
    step = 0

    def sample() -> Sequence[Tensor]:
        nonlocal step
        ops.swag_sample_(out, mean, m2, max(collected, RANK), deviations=rings, seed=1, step=step)
        step += 1
        return out

    yield Contender(drawn, sample)

    def sample_flat() -> Sequence[Tensor]:
        # What the authors' sample_fullrank does: everything flattened into vectors and one matrix first.
        mean_vector = torch.cat([m.flatten() for m in means])
        square = torch.cat([s.flatten() for s in squares])
        spread = torch.clamp(square - mean_vector**2, 1e-30).sqrt() * torch.randn_like(mean_vector)
        low_rank = torch.cat(rows, 1).t().matmul(torch.randn(RANK, device=device)) / math.sqrt(RANK - 1)
        drawn = mean_vector + math.sqrt(0.5) * (spread + low_rank)
        for into, part in zip(out, drawn.split([m.numel() for m in means]), strict=True):
            into.copy_(part.view_as(into))
        return out

    yield Contender("SWAG sample as its authors do", sample_flat, against=drawn)


def soup_group(device: str) -> Iterator[Contender | Missing]:
    """The mean of 8 bfloat16 checkpoints."""
    shapes = resnet50()
    generator = torch.Generator().manual_seed(0)
    sources = [[torch.randn(s, generator=generator).to(device, torch.bfloat16) for s in shapes] for _ in range(8)]
    out = [torch.empty_like(t) for t in sources[0]]
    share = [1 / 8] * 8

    def error(made: Sequence[Tensor]) -> float:
        expected = torch.stack([s[-2] for s in sources]).double().mean(0)
        return ((made[-2].double() - expected).abs().max() / expected.abs().max()).item()

    def ours() -> Sequence[Tensor]:
        ops.weighted_sum_(out, sources, share)
        return out

    def stack() -> Sequence[Tensor]:
        return [torch.stack(rows).float().mean(0).bfloat16() for rows in zip(*sources, strict=True)]

    def addcmul() -> Sequence[Tensor]:
        made = []
        for rows in zip(*sources, strict=True):
            total = torch.zeros_like(rows[0], dtype=torch.float32)
            for row in rows:
                total.addcmul_(row.float(), torch.tensor(1 / 8, device=device))
            made.append(total.bfloat16())
        return made

    yield Contender("ours, soup", ours, error, 2**-8)
    yield Contender("stack, float, mean", stack, error, 2**-8, against="ours, soup")
    yield Contender("one addcmul a checkpoint and tensor, as mergekit", addcmul, error, 2**-8, against="ours, soup")


class Burner:
    """A process that keeps the first core busy while `with` holds."""

    def __init__(self) -> None:
        code = "import os\nos.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\nwhile True: pass"
        self.process = subprocess.Popen([sys.executable, "-c", code])
        self.pause()

    def pause(self, *_: object) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def __enter__(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    __exit__ = pause

    def __del__(self) -> None:
        self.process.kill()


def busy_group(device: str) -> Iterator[Contender | Missing]:
    case, burner = Case(resnet50(), device), Burner()
    averages, lists = case.averages(), case.averages()
    plan = ops.AveragePlan(averages, case.weights)

    def busy(update: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            with burner:
                update()

        return run

    foreach = partial(torch._foreach_lerp_, lists, case.weights, 1 - DECAY)
    yield case.contender("ours, idle machine", lambda: plan.ema_(DECAY), lambda: averages, None)
    yield Contender("ours, one core taken", busy(lambda: plan.ema_(DECAY)), against="ours, idle machine")
    yield Contender("torch._foreach_lerp_, one core taken", busy(foreach), against="ours, idle machine")


def groups(device: str, quick: bool) -> list[Group]:
    sets: dict[str, tuple[list[tuple[int, ...]], int]] = {"ResNet-50": (resnet50(), 1), "ViT-B": (vit_base(), 1)}
    if quick:
        sets = {"ResNet-50": (resnet50()[:20], 1)}

    def update() -> Iterator[Contender | Missing]:
        for title, (shapes, repeat) in sets.items():
            yield from update_group(title, Case(shapes, device), repeat)

    def within(title: str) -> Gate:
        floor = f"floor: lerp_ of two flat arrays, {title}"
        return Gate(f"EMA of {title}, in floors", f"ours, {title}", floor, (1.1, 1.1), at_most=True)

    tiny = "2000 tensors of 64"
    one = "161 tensors of one number"
    made = [
        Group("update", "One EMA update, float32", update, [] if quick else [within("ResNet-50"), within("ViT-B")]),
        Group(
            "tiny",
            f"One EMA update of {tiny}, float32",
            lambda: update_group(tiny, Case(TINY, device), 20),
            [
                Gate(f"updates of {tiny} a second", f"ours, {tiny}", None, (33_333, 33_333)),
                Gate(
                    f"{tiny}, against foreach",
                    f"torch._foreach_lerp_ of ready lists, {tiny}",
                    f"ours, {tiny}",
                    (25, 25),
                ),
                Gate(
                    f"{tiny}, WeightAverager against timm",
                    f"timm ModelEmaV3, {tiny}",
                    f"ours, WeightAverager, {tiny}",
                    (200, 200),
                ),
            ],
        ),
        Group(
            "host",
            f"Time of the host alone: {one}",
            lambda: host_group(device),
            [
                Gate("plan's updates a second (host)", f"ours, {one}", None, (100_000, 100_000)),
                Gate(
                    "WeightAverager's updates a second (host)", f"ours, WeightAverager, {one}", None, (100_000, 100_000)
                ),
            ],
        ),
        Group("bfloat16", "One EMA update of bfloat16 weights, ResNet-50", lambda: bfloat16_group(device)),
        Group("passes", "Several quantities in one pass, ResNet-50, float32", lambda: passes_group(device)),
        Group(
            "swag",
            "SWAG: ResNet-50 collected, 8.4 M weights drawn",
            lambda: swag_group(device),
            [
                Gate(
                    "SWAG collect, against the authors' way",
                    "SWAG collect as its authors do, torch.cat",
                    f"ours, SWAG collect, K = {RANK}",
                    (40, 40),
                ),
                Gate(
                    "SWAG sample, against the authors' way",
                    "SWAG sample as its authors do",
                    f"ours, SWAG sample, K = {RANK}",
                    (8, 8),
                ),
            ],
        ),
        Group(
            "soup",
            "Mean of 8 bfloat16 checkpoints, ResNet-50",
            lambda: soup_group(device),
            [
                Gate(
                    "soup, against mergekit's way",
                    "one addcmul a checkpoint and tensor, as mergekit",
                    "ours, soup",
                    (4, 4),
                )
            ],
        ),
    ]
    if device == "cpu" and hasattr(os, "sched_setaffinity"):
        gate = Gate("one core taken", "ours, one core taken", "ours, idle machine", (None, 2), at_most=True)
        made.append(Group("busy", "One core taken by another process, ResNet-50", lambda: busy_group(device), [gate]))
    return [replace(group, family="average") for group in made]
