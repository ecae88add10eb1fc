"""Curves of low loss between two trained models, and pictures of the loss along them and in a plane of weights.

::

    curve = Curve(model, first.state_dict(), second.state_dict())
    curve.fit(lambda model, batch: cross_entropy(model(batch[0]), batch[1]), train_loader, steps=20_000)
    found = curve.evaluate(test_loss, bn_loader=train_loader)
    plot_curve({"curve": found}).figure.savefig("curve.png")

T. Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018, arXiv:1802.10026.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnuggets import ops
from fastnuggets.training.batchnorm import update_bn
from fastnuggets.training.schedules import FlatLinearFlatLR
from fastnuggets.training.weights import (
    Forward,
    buffers,
    check_fit,
    device_of,
    evaluation,
    move,
    parameters,
    restored,
    tensors,
    track,
    unwrap,
    write,
)

Weights = nn.Module | Mapping[str, Tensor]
Loss = Callable[[nn.Module], float | Tensor]


class CurveLoss(NamedTuple):
    """What :meth:`Curve.evaluate` found at P points; float64, on the CPU."""

    t: Tensor  # [P], from 0 to 1
    length: Tensor  # [P], of the curve from its start to there, in the norm of all parameters together
    loss: Tensor  # [P, ...]


class LossPlane(NamedTuple):
    """The loss on a grid in the plane of three sets of weights; float64, on the CPU.

    The origin is the first set, the second lies on the x axis, the third above it; units are those of the weights.
    """

    x: Tensor  # [X]
    y: Tensor  # [Y]
    loss: Tensor  # [Y, X, ...]
    points: Tensor  # [3, 2], where the three sets lie
    path: Tensor | None = None  # [P, 2], a curve in the plane


class Curve:
    """A curve in the space of weights that joins two models: a Bezier curve, or a chain of straight lines.

    Its points are ``w(t) = Σ_k coefficients(t)[k] points[k]``, where the first and the last of the control points are
    the two models and those between them, the bends, are trained. The model is the place where points are written and
    evaluated. Floating buffers go over linearly from one end's to the other's, integer ones are the nearer end's;
    running statistics of BatchNorm layers must be computed anew for every point (``bn_loader``).

    Args:
        model: may be compiled or wrapped; all of it on one device.
        start, end: models like it, or their state dicts. Copied.
        kind: "bezier" or "chain".
        bends: control points between the ends, at least 0 (a straight line). They start on the straight line, evenly.

    Raises:
        ValueError: naming the argument, or the tensors of an end that do not fit.

    Attributes:
        points: bends + 2 lists of the parameters' tensors. Bends are float32 at least, and require a gradient.
    """

    def __init__(self, model: nn.Module, start: Weights, end: Weights, kind: str = "bezier", bends: int = 1) -> None:
        if kind not in ("bezier", "chain"):
            raise ValueError(f'kind must be "bezier" or "chain", got {kind!r}')
        if bends < 0:
            raise ValueError(f"bends must be at least 0, got {bends}")
        self.model, self.kind, self.bends = model, kind, bends
        first, last = (_fitting(model, weights, name) for weights, name in ((start, "start"), (end, "end")))
        self.names = list(parameters(model))
        self._buffers = [{name: side[name].clone() for name in buffers(model)} for side in (first, last)]
        ends = [[side[name].clone() for name in self.names] for side in (first, last)]
        self.points: list[list[Tensor]] = [ends[0]]
        for k in range(1, bends + 1):
            bend = [torch.empty_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in ends[0]]
            ops.weighted_sum_(bend, ends, [1 - k / (bends + 1), k / (bends + 1)])
            self.points.append([w.requires_grad_() for w in bend])
        self.points.append(ends[1])

    def parameters(self) -> list[Tensor]:
        """All tensors of all bends, for an optimizer."""
        return [weight for bend in self.points[1:-1] for weight in bend]

    def coefficients(self, t: float | Tensor) -> Tensor:
        """What each control point counts at t in [0, 1]: [..., bends + 2], float64, on the CPU; their sum is 1."""
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        if not ((at >= 0) & (at <= 1)).all():
            raise ValueError(f"t must be in [0, 1], got {t}")
        pieces = self.bends + 1
        k = torch.arange(pieces + 1)
        at = at.unsqueeze(-1)
        if self.kind == "chain":
            return (1 - (at * pieces - k).abs()).clamp(min=0)
        choose = torch.tensor([math.comb(pieces, i) for i in range(pieces + 1)], dtype=torch.float64)
        return choose * at**k * (1 - at) ** (pieces - k)

    def point_(self, t: float) -> None:
        """Writes the weights w(t) into the model, in one launch; at 0 and 1 they are the ends' bits."""
        counted = [(k, c) for k, c in enumerate(self.coefficients(t).tolist()) if c]
        sources = [[weight.detach() for weight in self.points[k]] for k, _ in counted]
        held = parameters(self.model)
        ops.weighted_sum_([held[name] for name in self.names], sources, [c for _, c in counted])
        live = dict(unwrap(self.model).named_buffers()) if self._buffers[0] else {}
        for name, first in self._buffers[0].items():
            buffer, last = live[name].detach(), self._buffers[1][name]
            whole = not buffer.is_floating_point()
            buffer.copy_((first if t < 0.5 else last) if whole or t in (0, 1) else first.lerp(last, t))

    def pull_back_(self, t: float, *, weight_decay: float = 0.0, accumulate: bool = False) -> None:
        """The bends' gradients from the model's: ``grad = coefficient (model's grad + weight_decay w(t))``.

        The chain rule through w(t), which the model must still hold, and through ``weight_decay / 2 |w(t)|²``: one
        launch a bend, without autograd. A missing gradient counts as zeros; frozen parameters give none to the bends.

        Args:
            accumulate: add to gradients that are there, as several t in one step need, instead of replacing them.
        """
        coefficients = self.coefficients(t).tolist()
        live = dict(unwrap(self.model).named_parameters())
        used = [i for i, name in enumerate(self.names) if live[name].requires_grad]
        trained = [live[self.names[i]] for i in used]
        weights = [weight.detach() for weight in trained]
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in trained]
        for k in range(1, self.bends + 1):
            sums = [_gradient_of(self.points[k][i]) for i in used]
            terms = [(gradients, coefficients[k])]
            terms += [(weights, coefficients[k] * weight_decay)] if weight_decay else []
            terms += [(sums, 1.0)] if accumulate else []
            ops.weighted_sum_(sums, [source for source, _ in terms], [c for _, c in terms])

    def fit(
        self,
        loss: Callable[[nn.Module, Any], Tensor],
        loader: Iterable[Any],
        *,
        steps: int,
        lr: float = 0.015,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        optimizer: torch.optim.Optimizer | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> list[float]:
        """Trains the bends to lower the mean loss over the curve, E L(w(t)) with t uniform in [0, 1].

        Each minibatch has a t of its own. The ends stay; the rate is flat for half of the steps, then falls linearly
        to 1 % until 9/10 of them, and is flat again. Afterwards the model is as it was. Call it again to go on.

        Args:
            loss: of the model, in training mode, for a batch: a scalar.
            loader: batches, gone through again and again; their tensors are moved to where the model is.
            steps: minibatches.
            lr, momentum: of SGD. The paper's: 0.015 for 600 epochs of VGG-16, 0.03 for 200 of PreResNet-164.
            weight_decay: of ``weight_decay / 2 |w(t)|²``, on the curve's point, not on the bends.
            optimizer: of :meth:`parameters`, instead of SGD; its rate is where the schedule starts.
            seed: of the t. The same seed, loader and threads give the same bits.

        Returns:
            the loss of each step, without the decay's part. Synchronises in each.

        Raises:
            ValueError: there is nothing to train, or the loader gave no batch. RuntimeError: the loss is not finite.
        """
        if not self.bends:
            raise ValueError("a curve without bends has nothing to train")
        optimizer = optimizer or torch.optim.SGD(self.parameters(), lr=lr, momentum=momentum)
        schedule = FlatLinearFlatLR(optimizer, steps)
        times = torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
        place = device_of(self.model)
        losses: list[float] = []
        with restored(self.model), _own_gradients(self.model), torch.enable_grad():
            self.model.train()
            batches = _again_and_again(loader)
            for t in track(times, "curve", progress):
                self.point_(t)
                self.model.zero_grad(set_to_none=True)
                value = loss(self.model, move(next(batches), place))
                value.backward()
                self.pull_back_(t, weight_decay=weight_decay)
                losses.append(value.item())
                if not math.isfinite(losses[-1]):
                    raise RuntimeError(f"the loss became {losses[-1]} at step {len(losses) - 1}, t = {t:.3f}")
                optimizer.step()
                schedule.step()
        return losses

    def evaluate(
        self,
        loss: Loss,
        *,
        points: int | Sequence[float] = 61,
        spacing: str = "t",
        bn_loader: Iterable[Any] | None = None,
        forward: Forward | None = None,
        progress: bool = True,
    ) -> CurveLoss:
        """The loss along the curve. The model is in evaluation mode, and afterwards as it was.

        Args:
            loss: called with the model at each point: a number, or a tensor of several, such as a loss and an error.
            points: how many, ends included, or a list of t.
            spacing: of a number of points: even in "t", or in "length" along the curve.
            bn_loader: training batches, for :func:`update_bn` at each point. Needed if the model has BatchNorm layers.
            forward: as in :func:`update_bn`.
        """
        if spacing not in ("t", "length"):
            raise ValueError(f'spacing must be "t" or "length", got {spacing!r}')
        if not isinstance(points, int):
            times = torch.tensor(list(points), dtype=torch.float64)
        else:
            times = self.uniform(points) if spacing == "length" else torch.linspace(0, 1, points, dtype=torch.float64)

        def placed() -> Iterator[None]:
            for t in times.tolist():
                self.point_(t)
                yield

        found = _losses(self.model, track(placed(), "curve", progress, len(times)), loss, bn_loader, forward)
        return CurveLoss(times, self.length(times), found)

    def length(self, t: float | Tensor = 1.0) -> Tensor:
        """Length of the curve from its start to t [...], float64, on the CPU.

        Exact for chains; for Bezier curves the sum of 1024 chords a piece, too short by about 1e-7 of the whole.
        Synchronises.
        """
        grid, lengths = self._lengths()
        at = torch.as_tensor(t, dtype=torch.float64, device="cpu")
        return _interpolate(at, grid, lengths)

    def uniform(self, points: int) -> Tensor:
        """The t [points] of points that are evenly spaced along the curve, ends included. Synchronises."""
        grid, lengths = self._lengths()
        even = torch.linspace(0, 1, points, dtype=torch.float64)
        return _interpolate(even * lengths[-1], lengths, grid) if lengths[-1] > 0 else even

    def _lengths(self) -> tuple[Tensor, Tensor]:
        """A fine grid of t, corners of chains included, and the curve's length up to each: [G], [G]."""
        grid = torch.linspace(0, 1, 1024 * (self.bends + 1) + 1, dtype=torch.float64)
        # |w(t') - w(t)|² needs the control points' inner products alone, not the weights again.
        products = _inner_products(self.points[0], self.points[1:])
        steps = self.coefficients(grid).diff(dim=0)[:, 1:]
        chords = ((steps @ products) * steps).sum(-1).clamp(min=0).sqrt()
        return grid, torch.cat([torch.zeros(1, dtype=torch.float64), chords.cumsum(0)])

    def plane(self, loss: Loss, **options: Any) -> LossPlane:
        """:func:`loss_plane` through the ends and the bend of a curve with one bend, and the curve in it."""
        if self.bends != 1:
            raise ValueError(f"only a curve with one bend lies in a plane, this one has {self.bends}")
        start, bend, end = ({n: w.detach() for n, w in zip(self.names, p, strict=True)} for p in self.points)
        plane = loss_plane(self.model, start, end, bend, loss, **options)
        counts = self.coefficients(torch.linspace(0, 1, 61, dtype=torch.float64))
        return plane._replace(path=counts[:, [0, 2, 1]] @ plane.points)

    def state_dict(self) -> dict[str, Tensor]:
        """The bends: "0.name", "1.name", ... The ends are given at construction."""
        bends = enumerate(self.points[1:-1])
        return {f"{k}.{n}": w.detach() for k, bend in bends for n, w in zip(self.names, bend, strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Writes the bends. ValueError if the state is of another model or number of bends."""
        write(self.state_dict(), state, "state")


def loss_plane(
    model: nn.Module,
    w1: Weights,
    w2: Weights,
    w3: Weights,
    loss: Loss,
    *,
    grid: int | tuple[int, int] = 21,
    margin: float = 0.2,
    bn_loader: Iterable[Any] | None = None,
    forward: Forward | None = None,
    progress: bool = True,
) -> LossPlane:
    """The loss in the plane through three sets of weights. The model is evaluated in place, and afterwards as it was.

    Args:
        w1, w2, w3: models like it, or their parameters by name (state dicts). Buffers stay those of the model.
        loss, bn_loader, forward: as in :meth:`Curve.evaluate`.
        grid: points along x and along y.
        margin: how far the grid reaches beyond the three, as a part of their extent.

    Raises:
        ValueError: the three lie on a line, or one does not fit the model, naming what does not.
    """
    held = parameters(model)
    sets = []
    for weights, name in ((w1, "w1"), (w2, "w2"), (w3, "w3")):
        given = parameters(weights) if isinstance(weights, nn.Module) else weights
        check_fit(held, {key: given[key] for key in held if key in given}, name)
        sets.append([given[key].detach().to(held[key].device) for key in held])
    products = _inner_products(sets[0], sets[1:])
    width = products[0, 0].sqrt()
    along = products[0, 1] / width
    height = (products[1, 1] - along.square()).clamp(min=0).sqrt()
    if not (width > 0 and height > 1e-6 * products[1, 1].sqrt()):
        raise ValueError("w1, w2 and w3 must not lie on a line")
    corners = torch.stack([torch.zeros(2), torch.stack([width, width * 0]), torch.stack([along, height])]).double()
    low, high = corners.amin(0), corners.amax(0)
    low, high = low - margin * (high - low), high + margin * (high - low)
    counts = (grid, grid) if isinstance(grid, int) else grid
    x, y = (torch.linspace(float(a), float(b), n).double() for a, b, n in zip(low, high, counts, strict=True))
    third = (y / height).view(-1, 1).expand(len(y), len(x))
    second = (x - third * along) / width
    shares = torch.stack([1 - second - third, second, third], -1).flatten(0, 1)

    def placed() -> Iterator[None]:
        for share in shares.tolist():
            ops.weighted_sum_(list(held.values()), sets, share)
            yield

    found = _losses(model, track(placed(), "plane", progress, len(shares)), loss, bn_loader, forward)
    return LossPlane(x, y, found.unflatten(0, (len(y), len(x))), corners)


def plot_curve(found: CurveLoss | Mapping[str, CurveLoss], ax: Any = None, *, column: int = 0, over: str = "t") -> Any:
    """Draws losses along curves, by name if there are several; returns the axes, of a figure of its own by default.

    Args:
        column: which number of the loss, if it has several.
        over: "t", or "length".
    """
    ax = _axes(ax)
    for label, line in (found if isinstance(found, Mapping) else {"": found}).items():
        ax.plot(getattr(line, over), _column(line.loss, 1, column), label=label)
    if isinstance(found, Mapping):
        ax.legend()
    ax.set_xlabel({"t": "t", "length": "distance along the curve"}[over])
    ax.set_ylabel("loss")
    return ax


def plot_plane(plane: LossPlane, ax: Any = None, *, column: int = 0, levels: int = 12) -> Any:
    """Draws the loss in a plane as contours, evenly spaced in its logarithm above the lowest value, with the three
    points and the path in it; returns the axes, of a figure of its own by default."""
    import numpy as np
    from matplotlib.colors import BoundaryNorm

    ax = _axes(ax)
    values = _column(plane.loss, 2, column).numpy()
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise ValueError("the loss is finite nowhere in the plane")
    rise = finite - finite.min()
    # The far corners of a plane are orders of magnitude above its valleys: without them colours tell nothing.
    top = max(np.quantile(rise, 0.9), 1e-12)
    bounds = finite.min() + np.concatenate([[0.0], np.geomspace(top / 100, top, levels)])
    filled = ax.contourf(
        plane.x,
        plane.y,
        np.ma.masked_invalid(values),
        bounds,
        extend="max",
        norm=BoundaryNorm(bounds, 256, extend="max"),
    )
    ax.figure.colorbar(filled, ax=ax, label="loss", format="%.3g")
    if plane.path is not None:
        ax.plot(*plane.path.T, color="white")
    ax.plot(*plane.points.T, "o", color="black")
    ax.set_aspect("equal")
    return ax


def _fitting(model: nn.Module, weights: Weights, name: str) -> dict[str, Tensor]:
    """The weights and buffers of a model or a state dict, on the model's device."""
    held = tensors(model)
    given = tensors(weights) if isinstance(weights, nn.Module) else weights
    found = {key: given[key] for key in held if key in given}
    check_fit(held, found, name)
    return {key: tensor.detach().to(held[key].device) for key, tensor in found.items()}


def _losses(
    model: nn.Module,
    placed: Iterable[Any],
    loss: Loss,
    bn_loader: Iterable[Any] | None,
    forward: Forward | None,
) -> Tensor:
    """The loss of each set of weights that `placed` puts into the model: [points, ...]."""
    found = []
    with restored(model), torch.no_grad():
        for _ in placed:
            if bn_loader is not None:
                update_bn(bn_loader, model, forward=forward, progress=False)
            evaluation(model)
            found.append(torch.as_tensor(loss(model)).detach().to("cpu", torch.float64))
    return torch.stack(found)


def _inner_products(origin: Sequence[Tensor], points: Sequence[Sequence[Tensor]]) -> Tensor:
    """Inner products of the points' differences from the origin, all tensors together: [K, K] float64, on the CPU."""
    total = torch.zeros(len(points), len(points), dtype=torch.float64)
    with torch.no_grad():
        for i, base in enumerate(origin):
            apart = torch.stack([(point[i].to(base.device).double() - base.double()).flatten() for point in points])
            total += (apart @ apart.T).cpu()
    return total


def _gradient_of(weight: Tensor) -> Tensor:
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


@contextlib.contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Inside, the model has gradients of its own; afterwards those from before, or none."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _again_and_again(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("the loader gave no batch")


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear y(x) at the places; x does not fall."""
    right = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    x0, x1, y0, y1 = x[right - 1], x[right], y[right - 1], y[right]
    return y0 + (y1 - y0) * ((at - x0) / (x1 - x0)).nan_to_num(0.0)


def _column(loss: Tensor, dims: int, column: int) -> Tensor:
    return loss.flatten(dims)[..., column] if loss.dim() > dims else loss


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    from matplotlib.figure import Figure

    return Figure(layout="constrained").add_subplot()
