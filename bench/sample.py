"""Sampling: our noise, draws and masks beside torch's, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import Contender, Gate, Group
from fastnuggets import ops, reference
from fastnuggets.ops.sample import KINDS

SEED = 5
# The noise is float32's; its largest values are near 20.
TOLERANCE = 2e-6
CHECKED = 64  # rows of a result that are compared


def worst(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """The largest error over the largest value (or 1), over all pairs of a result and what it should be."""
    return max(((a.double() - e).abs().max() / e.abs().max().clamp_min(1)).item() for a, e in pairs)


def noise_group(device: str, n: int) -> Iterator[Contender]:
    """Numbers into a tensor that exists."""
    torch_fills: dict[str, Callable[[Tensor], Any]] = {
        "normal": Tensor.normal_,
        "uniform": Tensor.uniform_,
        "exponential": Tensor.exponential_,
        "gumbel": lambda x: x.exponential_().log_().neg_(),
        "keep": lambda x: x.bernoulli_(0.5),
    }
    for kind, fill in torch_fills.items():
        key = ops.noise_key(device, key=SEED)
        out, other = torch.empty(n, device=device), torch.empty(n, device=device)
        number = KINDS.index(kind)

        def run(out: Tensor = out, number: int = number, key: Tensor = key) -> Tensor:
            torch.ops.fastnuggets.fill_noise_(out, 0.0, 1.0, key, number, 0.5)
            return out

        def error(made: Tensor, kind: str = kind, key: Tensor = key) -> float:
            part = min(n, 100_000)
            return worst([(made[:part], reference.noise(key.cpu(), kind, (part,), 0.5).to(made.device))])

        yield Contender(f"ours, {kind}", run, error, TOLERANCE)
        name = {"keep": "bernoulli_"}.get(kind, f"{kind}_") if kind != "gumbel" else "exponential_, log_, neg_"
        yield Contender(f"torch {name}", lambda fill=fill, other=other: fill(other), against=f"ours, {kind}")


def both_ways(function: Callable[..., Any], inputs: list[Tensor], weight: Tensor) -> Callable[[], Any]:
    """Outputs, then the gradients of the inputs for the cotangents `weight` and, of a KL, ones."""

    def run() -> Any:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [weight, *(torch.ones_like(o) for o in outputs[1:])]
        return [o.detach() for o in outputs], torch.autograd.grad(outputs, inputs, cotangents)

    return run


def leaves(device: str, count: int, shape: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device).requires_grad_() for _ in range(count)]


def checked(ours: Callable[..., Any], inputs: list[Tensor], weight: Tensor) -> Callable[[Any], float]:
    """Compares the first rows, forward and backward, with the definition in float64."""

    def error(result: Any) -> float:
        few = [t.detach()[:CHECKED].double().cpu().requires_grad_() for t in inputs]
        outputs, gradients = both_ways(ours, few, weight[:CHECKED].double().cpu())()
        found = [t[:CHECKED].cpu() for t in (*result[0], *result[1])]
        return worst(list(zip(found, [*outputs, *gradients], strict=True)))

    return error


def draw_group(device: str, shape: tuple[int, int]) -> Iterator[Contender]:
    """z and its KL to N(0, 1), summed over rows, of a mean and a log-variance."""
    inputs = leaves(device, 2, shape)
    weight = torch.randn(shape, device=device)

    def definition(mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        key = ops.noise_key(key=SEED)
        return reference.rsample_normal(mean, logvar, key, "logvar"), reference.kl_normal(
            mean, logvar, "logvar", event_dims=1
        )

    def ours(mean: Tensor, logvar: Tensor) -> Any:
        return ops.rsample_normal_kl(mean, logvar, form="logvar", key=SEED)

    def eager(mean: Tensor, logvar: Tensor) -> Any:
        z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
        return z, 0.5 * (mean * mean + logvar.exp() - 1 - logvar).sum(-1)

    def distributions(mean: Tensor, logvar: Tensor) -> Any:
        q = torch.distributions.Normal(mean, (0.5 * logvar).exp())
        return q.rsample(), torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)

    name = f"ours, z and KL, {shape[0]} x {shape[1]}"
    yield Contender(name, both_ways(ours, inputs, weight), checked(definition, inputs, weight), TOLERANCE)
    for other, function in (("eager", eager), ("torch.distributions", distributions)):
        yield Contender(f"{other}, {shape[0]} x {shape[1]}", both_ways(function, inputs, weight), against=name)


def mask_group(device: str, shape: tuple[int, int]) -> Iterator[Contender]:
    """Dropout, Gaussian dropout and Gumbel-softmax."""
    inputs = leaves(device, 1, shape)
    weight = torch.randn(shape, device=device)
    key = ops.noise_key(key=SEED)
    rows: dict[str, tuple[Callable[..., Any], Callable[..., Any], str, Callable[..., Any]]] = {
        "dropout": (
            lambda x: ops.dropout(x, 0.5, key=SEED),
            lambda x: reference.scaled_noise(None, x, key, "keep", 0.5),
            "F.dropout",
            lambda x: F.dropout(x, 0.5),
        ),
        "Gaussian dropout": (
            lambda x: ops.gaussian_dropout(x, 0.5, key=SEED),
            lambda x: reference.scaled_noise(None, x, key, "gain", 1.0),
            "x (1 + randn_like(x))",
            lambda x: x * (1 + torch.randn_like(x)),
        ),
        "Gumbel-softmax": (
            lambda x: ops.gumbel_softmax(x, key=SEED),
            lambda x: (x + reference.noise(key, "gumbel", tuple(x.shape))).softmax(-1),
            "F.gumbel_softmax",
            F.gumbel_softmax,
        ),
    }
    for name, (ours, definition, other, theirs) in rows.items():
        run = both_ways(ours, inputs, weight)
        yield Contender(f"ours, {name}", run, checked(definition, inputs, weight), TOLERANCE)
        yield Contender(other, both_ways(theirs, inputs, weight), against=f"ours, {name}")


def groups(device: str, quick: bool) -> list[Group]:
    n = 2**16 if quick else 2**20
    medium, large = ((64, 128), (128, 256)) if quick else ((4096, 512), (8192, 4096))
    per_second = 1e9 / n

    def draw_gates(shape: tuple[int, int]) -> list[Gate]:
        size = f"{shape[0]} x {shape[1]}"
        mine = f"ours, z and KL, {size}"
        return [
            Gate(f"z and KL, {size}, against eager", f"eager, {size}", mine, (4, 5.5)),
            Gate(f"z and KL, {size}, against torch.distributions", f"torch.distributions, {size}", mine, (6, 7.5)),
        ]

    made = [
        Group(
            "noise",
            f"{n} numbers into a tensor, float32",
            lambda: noise_group(device, n),
            [Gate(f"fills with {n} normals a second", "ours, normal", None, (per_second / 1.0, per_second / 0.55))],
        ),
        Group("draw", f"z and KL, {medium}, forward and backward", lambda: draw_group(device, medium),
              draw_gates(medium)),
        Group("draw large", f"z and KL, {large}, forward and backward", lambda: draw_group(device, large),
              draw_gates(large)),
        Group(
            "masks",
            f"Noise on {medium}, forward and backward",
            lambda: mask_group(device, medium),
            [
                Gate("dropout, against F.dropout", "F.dropout", "ours, dropout", (10, 10)),
                Gate("Gumbel-softmax, against F.gumbel_softmax", "F.gumbel_softmax", "ours, Gumbel-softmax", (8, 8)),
            ],
        ),
    ]  # fmt: skip
    return [replace(group, family="sample") for group in made]
