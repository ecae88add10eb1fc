"""Sampling: our noise, draws and masks beside torch's, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Contender, Gate, Group, Missing
from bench.peers import needs
from fastnuggets import ops, reference
from fastnuggets.nn import BayesLinear, kl
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


def draw_group(device: str, shape: tuple[int, int], everyone: bool) -> Iterator[Contender | Missing]:
    """z and its KL to N(0, 1), summed over rows, of a mean and a log-variance; by torch alone unless `everyone`."""
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

    size = f"{shape[0]} x {shape[1]}"
    name = f"ours, z and KL, {size}"
    yield Contender(name, both_ways(ours, inputs, weight), checked(definition, inputs, weight), TOLERANCE)
    for other, function in (("eager", eager), ("torch.distributions", distributions)):
        yield Contender(f"{other}, {size}", both_ways(function, inputs, weight), against=name)
    if everyone:
        yield compiled(f"torch.compile of eager, {size}", eager, inputs, weight, name)
        yield pyro(f"pyro, Monte Carlo KL, {size}", "Trace_ELBO", inputs, weight, name)
        yield pyro(f"pyro, analytic KL, {size}", "TraceMeanField_ELBO", inputs, weight, name)


def compiled(
    name: str, function: Callable[..., Any], inputs: list[Tensor], weight: Tensor, against: str
) -> Contender | Missing:
    """Compiled here for the number of threads that is set, and again when that changes, before anything is timed."""
    run = both_ways(torch.compile(function, fullgraph=True, dynamic=False), inputs, weight)
    try:
        run()
    except Exception as error:  # whatever a compiler that is missing or too old makes of it
        return Missing(name, str(error).strip().splitlines()[0])
    return Contender(name, run, against=against)


@needs("pyro")
def pyro(name: str, elbo: str, inputs: list[Tensor], weight: Tensor, against: str) -> Contender:
    """Model and guide under one of its bounds; the factor gives z the cotangent that it has for the others."""
    import pyro
    from pyro.distributions import Normal

    rows, n = weight.shape

    def draw(loc: Any, scale: Any) -> Any:
        with pyro.plate("rows", rows):
            return pyro.sample("z", Normal(loc, scale).to_event(1))

    def guide(mean: Tensor, logvar: Tensor) -> None:
        draw(mean, (0.5 * logvar).exp())

    def model(mean: Tensor, logvar: Tensor) -> None:
        z = draw(mean.new_zeros(n), mean.new_ones(n))
        pyro.factor("data", -(z * weight).sum())

    bound = getattr(pyro.infer, elbo)()

    def run() -> Any:
        loss = bound.differentiable_loss(model, guide, *inputs)
        return loss.detach(), torch.autograd.grad(loss, inputs)

    return Contender(name, run, against=against)


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


# --- a layer of Gaussian weights --------------------------------------------------------------------------------------

# Fresh memory costs more than all arithmetic of a layer this wide. So glibc keeps, for everyone, what has been freed:
# no block is mapped for itself, and the heap is not given back.
RECYCLING = {"GLIBC_TUNABLES": f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**40}"}
FEATURES = 8  # of the output that are compared
# Products of 4096 float32 numbers. Seen: 4.6e-7.
LAYER_TOLERANCE = 3e-6
# A softplus is what bayesian-torch and blitz store; an exponential, our default, is torchbnn's.
LAYERS = {
    "weight sampling": ("weight", "log_std"),
    "weight sampling, softplus": ("weight", "rho"),
    "local": ("local", "log_std"),
    "local, softplus": ("local", "rho"),
    "flipout": ("flipout", "log_std"),
}


def layer_run(
    layer: nn.Module, x: Tensor, weight: Tensor, forward: Callable[[nn.Module, Tensor], list[Tensor]]
) -> Callable[[], Any]:
    """Output and divergence, then the gradients of x and the parameters for the cotangents `weight` and 1."""
    parameters = list(layer.parameters())

    def run() -> Any:
        outputs = forward(layer, x)
        cotangents = [weight, None][: len(outputs)]
        return [o.detach() for o in outputs], torch.autograd.grad(
            outputs, [x, *parameters], cotangents, allow_unused=True
        )

    return run


def layer_group(device: str, width: int, batch: int) -> Iterator[Contender | Missing]:
    """A linear layer of Gaussian weights without a bias, and its KL to N(0, 1)."""
    x, weight = (torch.randn(batch, width, device=device) for _ in range(2))
    x.requires_grad_()
    size = f"{width} x {width}"
    plain = nn.Linear(width, width, bias=False, device=device)
    yield Contender(f"nn.Linear, {size}", layer_run(plain, x, weight, lambda m, x: [m(x)]))
    for title, (sampling, form) in LAYERS.items():
        layer = BayesLinear(width, width, bias=False, sampling=sampling, form=form, init_std=0.05, device=device)
        run = layer_run(layer, x, weight, lambda m, x: [m(x, key=SEED), kl(m)])
        yield Contender(f"ours, {title}, {size}", run, layer_error(layer, x, weight), LAYER_TOLERANCE)
    for name, make in LAYER_PEERS.items():
        try:
            module, forward = make(width)
        except ImportError as error:
            yield Missing(f"{name}, {size}", str(error).splitlines()[0])
            continue
        ours = "flipout" if "Flipout" in name else "weight sampling"
        run = layer_run(module.to(device), x, weight, forward)
        yield Contender(f"{name}, {size}", run, against=f"ours, {ours}, {size}")


def layer_error(layer: BayesLinear, x: Tensor, weight: Tensor) -> Callable[[Any], float]:
    """Compares the first features of the output, the gradients of their weights and the KL with the definition."""

    def error(result: Any) -> float:
        (output, divergence), (_, by_mean, by_spread) = result
        form = layer.form
        mean, spread = (p.detach().cpu().double() for p in (layer.weight, getattr(layer, f"weight_{form}")))
        expected_kl = reference.kl_normal(mean, spread, form, event_dims=2)
        few = [t[:FEATURES].requires_grad_() for t in (mean, spread)]
        std = reference.std_of(few[1], form)
        expected = layer_definition(layer.sampling, x.detach().cpu().double(), few[0], std, layer.out_features)
        total = (expected * weight.cpu()[:, :FEATURES]).sum() + reference.kl_normal(*few, form, event_dims=2)
        gradients = torch.autograd.grad(total, few)
        found = [t.cpu()[:FEATURES] for t in (by_mean, by_spread)]
        pairs = [(output.cpu()[:, :FEATURES], expected), (divergence.cpu(), expected_kl)]
        return worst(pairs + list(zip(found, gradients, strict=True)))

    return error


def layer_definition(sampling: str, x: Tensor, mean: Tensor, std: Tensor, out_features: int) -> Tensor:
    """The first features, of the first rows of the weights, in float64."""
    key = ops.noise_key(key=SEED)
    size = len(x), out_features
    if sampling == "local":
        noise = reference.noise(key, "normal", size)[:, : len(mean)]
        return x @ mean.T + (x**2 @ (std**2).T).sqrt() * noise
    change = std * reference.noise(key, "normal", tuple(mean.shape))
    if sampling == "weight":
        return x @ (mean + change).T
    signs = [reference.noise(key + torch.tensor([0, i]), "sign", s) for i, s in ((2, tuple(x.shape)), (3, size))]
    return x @ mean.T + signs[1][:, : len(mean)] * ((signs[0] * x) @ change.T)


LayerPeer = tuple[nn.Module, Callable[[nn.Module, Tensor], list[Tensor]]]


def bayesian_torch(width: int, name: str) -> LayerPeer:
    from bayesian_torch import layers

    return getattr(layers, name)(width, width, bias=False), lambda m, x: list(m(x))


def torchbnn(width: int) -> LayerPeer:
    from torchbnn import BayesLinear, BKLLoss

    divergence = BKLLoss("sum")
    return BayesLinear(0.0, 1.0, width, width, bias=False), lambda m, x: [m(x), divergence(m)]


def blitz(width: int) -> LayerPeer:
    from blitz.losses import kl_divergence_from_nn
    from blitz.modules import BayesianLinear

    return BayesianLinear(width, width, bias=False), lambda m, x: [m(x), kl_divergence_from_nn(m)]


LAYER_PEERS: dict[str, Callable[[int], LayerPeer]] = {
    "bayesian-torch LinearReparameterization": lambda width: bayesian_torch(width, "LinearReparameterization"),
    "bayesian-torch LinearFlipout": lambda width: bayesian_torch(width, "LinearFlipout"),
    "torchbnn BayesLinear and BKLLoss": torchbnn,
    "blitz BayesianLinear": blitz,
}


def layer_gates(width: int) -> list[Gate]:
    size = f"{width} x {width}"
    plain, peers = f"nn.Linear, {size}", tuple(f"{name}, {size}" for name in LAYER_PEERS)
    made = []
    for title, most, least in (("weight sampling", 1.6, 2.3), ("local", 2.3, 1.6)):
        mine = f"ours, {title}, {size}"
        made.append(Gate(f"Bayesian linear, {title}, in nn.Linear", mine, plain, (most, most), at_most=True))
        made.append(Gate(f"Bayesian linear, {title}, against the fastest peer", peers, mine, (least, least)))
    return made


def groups(device: str, quick: bool) -> list[Group]:
    n = 2**16 if quick else 2**20
    medium, large = ((64, 128), (128, 256)) if quick else ((4096, 512), (8192, 4096))
    width, batch = (64, 16) if quick else (4096, 128)
    per_second = 1e9 / n

    recycling = RECYCLING if device == "cpu" else {}

    def draws(name: str, shape: tuple[int, int], *, every: bool = False, kept: bool = False) -> Group:
        size, where = f"{shape[0]} x {shape[1]}", ", memory kept" if kept else ""
        mine = f"ours, z and KL, {size}"
        gates = [
            Gate(f"z and KL, {size}{where}, against {other}", f"{other}, {size}", mine, goals)
            for other, goals in (("eager", (4, 5.5)), ("torch.distributions", (6, 7.5)))
        ]
        title = f"z and KL, {shape}, forward and backward" + ("; freed memory is kept and used again" if kept else "")
        return Group(name, title, lambda: draw_group(device, shape, every), gates,
                     environment=recycling if kept else {})  # fmt: skip

    made = [
        Group(
            "noise",
            f"{n} numbers into a tensor, float32",
            lambda: noise_group(device, n),
            [Gate(f"fills with {n} normals a second", "ours, normal", None, (per_second / 1.0, per_second / 0.55))],
        ),
        draws("draw", medium, every=True),
        draws("draw large", large),
        draws("draw large kept", large, kept=True),
        Group(
            "masks",
            f"Noise on {medium}, forward and backward",
            lambda: mask_group(device, medium),
            [
                Gate("dropout, against F.dropout", "F.dropout", "ours, dropout", (10, 10)),
                Gate("Gumbel-softmax, against F.gumbel_softmax", "F.gumbel_softmax", "ours, Gumbel-softmax", (8, 8)),
            ],
        ),
        Group(
            "bayes",
            f"A linear layer of Gaussian weights, {width} x {width}, batch {batch}, with its KL, forward and backward; "
            "freed memory is kept and used again",
            lambda: layer_group(device, width, batch),
            layer_gates(width),
            environment=recycling,
        ),
    ]  # fmt: skip
    return [replace(group, family="sample") for group in made]
