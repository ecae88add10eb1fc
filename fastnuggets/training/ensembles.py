"""Ensembles that one training leaves behind: members take the model's place in turn, predictions are averaged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastnuggets import ops
from fastnuggets.training.averaging import WeightAverager
from fastnuggets.training.batchnorm import update_bn
from fastnuggets.training.schedules import CosineCyclicLR, Cyclic, TriangularCyclicLR
from fastnuggets.training.weights import (
    Forward,
    buffers,
    call,
    device_of,
    evaluation,
    move,
    parameters,
    restored,
    tensors,
    track,
    write,
)

Output = Callable[[Any], Tensor]
Weights = dict[str, Tensor]


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, in float32 or wider: what ensembles average."""
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class _Ensemble:
    _schedule: type[Cyclic]
    _name: str

    def __init__(
        self,
        model: nn.Module,
        schedule: Cyclic | None = None,
        *,
        limit: int | None = None,
        folder: str | os.PathLike[str] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if schedule is not None and not isinstance(schedule, self._schedule):
            raise TypeError(f"schedule must be a {self._schedule.__name__}, got {type(schedule).__name__}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be a floating type, got {dtype}")
        self.model, self.schedule, self.limit = model, schedule, limit
        self.folder = None if folder is None else Path(folder)
        self.dtype = dtype
        self.device = torch.device("cpu") if folder is not None else None if device is None else torch.device(device)
        self.taken = 0
        self._stood = -1  # step of the schedule when update() was last called
        self._members: list[Weights | Path] = []

    def __len__(self) -> int:
        return len(self._members)

    def update(self) -> bool:
        """Takes the model if the schedule stands at its lowest rate, and says whether it did.

        Call it in every step, after ``optimizer.step()`` and before ``schedule.step()``.
        """
        if self.schedule is None:
            raise ValueError("update() needs a schedule; without one, call collect() where a model is to be taken")
        # A schedule that SequentialLR has done with stays where it ended, often at its lowest rate.
        moved = self.schedule.last_epoch != self._stood
        self._stood = self.schedule.last_epoch
        if moved and self.schedule.at_minimum:
            self.collect()
            return True
        return False

    def collect(self) -> None:
        """Takes the model as it is now; beyond the limit, the oldest member goes.

        Raises:
            ValueError: a weight is not finite, naming it. Synchronises.
        """
        held = tensors(self.model)
        floating = {name: tensor for name, tensor in held.items() if tensor.is_floating_point()}
        if (bad := ops.first_nonfinite(list(floating.values()))) >= 0:
            raise ValueError(f"{list(floating)[bad]} is not finite: this model would spoil every prediction")
        trained = parameters(self.model)
        member = {name: self._kept(tensor, name in trained) for name, tensor in held.items()}
        if self.folder is None:
            self._members.append(member)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / f"{self._name}-{self.taken:05d}.safetensors"
            _save(path, member)
            self._members.append(path)
        self.taken += 1
        if self.limit is not None:
            del self._members[: -self.limit]

    def _kept(self, tensor: Tensor, trained: bool) -> Tensor:
        # Running statistics keep their type: they are small, and a variance is squared.
        dtype = self.dtype if trained and tensor.is_floating_point() else None
        return tensor.to(device=self.device, dtype=dtype or tensor.dtype, copy=True)

    def weights(self, index: int) -> Weights:
        """Parameters and buffers of a member by name, the oldest is 0; from its file if it is on disk."""
        member = self._members[index]
        return _load(member) if isinstance(member, Path) else member

    def predict(self, inputs: Any, *, forward: Forward | None = None, output: Output = probabilities) -> Tensor:
        """The mean over all members of their predictions for one batch: [N, ..., classes], float32 or wider.

        The members take the model's place in turn, in evaluation mode and without gradients; afterwards the model is
        as it was, after an error too. Needs memory for one more set of weights.

        Args:
            inputs: a batch; it is moved to where the model is.
            forward: called with the model and the batch. Default: ``model(**batch)`` for a dict, ``model(batch[0])``
                for a tuple or list, else ``model(batch)``.
            output: turns what ``forward`` returns into what is averaged. Default: :func:`probabilities`.

        Raises:
            ValueError: there is no member, or one does not fit the model.
        """
        return _average(self.model, self._placed(), [inputs], forward, output)[0]

    def predict_loader(
        self,
        loader: Iterable[Any],
        *,
        forward: Forward | None = None,
        output: Output = probabilities,
        progress: bool = True,
    ) -> Tensor:
        """:meth:`predict` for every batch of a loader, joined: [samples, ..., classes] on the CPU.

        Each member goes over the whole loader before the next is put in place, so the loader must give the same batches
        in the same order each time.
        """
        members = track(self._placed(), "members", progress, total=len(self))
        return torch.cat(_average(self.model, members, loader, forward, output, torch.device("cpu")))

    def update_bn(self, loader: Iterable[Any], **options: Any) -> None:
        """Sets every member's running statistics with :func:`fastnuggets.training.update_bn` and the same arguments."""
        with restored(self.model):
            for index in self._placed():
                update_bn(loader, self.model, **options)
                found = buffers(self.model)
                member, stored = self.weights(index), self._members[index]
                fresh = member | {name: self._kept(tensor, False) for name, tensor in found.items()}
                if isinstance(stored, Path):
                    _save(stored, fresh)
                else:
                    self._members[index] = fresh

    def _placed(self) -> Iterator[int]:
        """Puts one member after the other in the model's place."""
        if not self._members:
            raise ValueError("the ensemble has no member yet")
        held = tensors(self.model)
        for index in range(len(self)):
            write(held, self.weights(index), f"member {index}")
            yield index

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs: the members, or the names of their files; loads with ``weights_only=True``."""
        names = [member.name if isinstance(member, Path) else dict(member) for member in self._members]
        return {"taken": self.taken, "members": names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a state, of the same folder if there is one.

        Raises:
            ValueError: a state of members on disk for an ensemble in memory, or the other way round.
            FileNotFoundError: a member's file is gone.
        """
        members: list[Weights | Path] = []
        for member in state["members"]:
            if isinstance(member, str) != (self.folder is not None):
                raise ValueError(
                    "the state is of an ensemble that is kept " + ("in memory", "on disk")[self.folder is None]
                )
            if self.folder is not None:
                path = self.folder / member
                if not path.is_file():
                    raise FileNotFoundError(f"{path}: a member of the ensemble is missing")
                members.append(path)
            else:
                place = self.device or device_of(self.model)
                members.append({name: tensor.to(place, copy=True) for name, tensor in member.items()})
        self.taken, self._members = state["taken"], members


class SnapshotEnsemble(_Ensemble):
    """The models at the ends of the cycles of a cosine rate, each a minimum of its own; their predictions are averaged.

    Args:
        model: the one that is trained.
        schedule: its ``CosineCyclicLR``, for :meth:`update`; None if :meth:`collect` is called by hand.
        limit: members that are kept, the last ones (the paper's m). Files of older ones stay on disk: a checkpoint
            from before may still name them.
        folder: where members are written, as safetensors files, whole or not at all; default: kept in memory. A member
            there is read when it is its turn.
        dtype: in which parameters are kept; buffers keep their type. Default: the model's.
        device: where members in memory are kept. Default: where the model is.

    Raises:
        TypeError, ValueError: naming the argument.

    G. Huang et al., Snapshot Ensembles: Train 1, Get M for Free, ICLR 2017, arXiv:1704.00109.
    """

    _schedule, _name = CosineCyclicLR, "snapshot"


class FastGeometricEnsemble(_Ensemble):
    """The models in the middle of the short cycles of a triangular rate, along a path of low loss.

    Args, errors: as :class:`SnapshotEnsemble`, with a ``TriangularCyclicLR``.

    T. Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs, NeurIPS 2018, arXiv:1802.10026.
    """

    _schedule, _name = TriangularCyclicLR, "fge"


def swag_predict(
    averager: WeightAverager,
    loader: Iterable[Any],
    *,
    samples: int = 30,
    scale: float = 0.5,
    seed: int = 0,
    bn_loader: Iterable[Any] | None = None,
    forward: Forward | None = None,
    output: Output = probabilities,
    progress: bool = True,
) -> Tensor:
    """Bayesian model averaging: the mean prediction over weights drawn from SWAG's posterior, [samples, ..., classes]
    on the CPU. Afterwards model and averages are as they were, after an error too.

    Args:
        averager: of mode "swag"; its model predicts.
        loader: batches, the same ones in the same order each time it is gone through; ``[inputs]`` for one.
        samples: the paper's S, below 2^20.
        scale: of the covariance, as in ``WeightAverager.sample``.
        seed: below 2^43; each gives its own draws, and the same one the same draws.
        bn_loader: training batches, for new running statistics with each draw. Needed if the model has BatchNorm
            layers: a draw's activations have statistics of their own.
        forward, output: as in :meth:`SnapshotEnsemble.predict`; ``forward`` also in the pass over ``bn_loader``.

    Raises:
        ValueError, RuntimeError: naming the argument; as ``WeightAverager.sample``.

    W. Maddox et al., A Simple Baseline for Bayesian Uncertainty in Deep Learning, NeurIPS 2019, arXiv:1902.02476.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")

    def drawn() -> Iterator[int]:
        for number in range(samples):
            averager.sample((seed << 20) + number, scale=scale)
            if bn_loader is not None:
                update_bn(bn_loader, averager.model, forward=forward, progress=False)
            yield number

    numbers = track(drawn(), "draws", progress, total=samples)
    with averager.swapped() as model:
        return torch.cat(_average(model, numbers, loader, forward, output, torch.device("cpu")))


def _average(
    model: nn.Module,
    placed: Iterable[Any],
    loader: Iterable[Any],
    forward: Forward | None,
    output: Output,
    device: torch.device | None = None,
) -> list[Tensor]:
    """For each batch the mean of the outputs of the models that `placed` puts into the model's place, one at a time."""
    totals: list[Tensor] = []
    members = 0
    place = device_of(model)
    with restored(model), torch.no_grad():
        for _ in placed:
            evaluation(model)
            batches = 0
            for batch in loader:
                found = output((forward or call)(model, move(batch, place)))
                if members == 0:
                    totals.append(found.to(device or found.device, copy=True))
                elif batches == len(totals):
                    raise ValueError("the loader gave more batches to one member than to another")
                else:
                    totals[batches] += found.to(totals[batches].device)
                batches += 1
            if not batches:
                raise ValueError("the loader gave no batch")
            if batches < len(totals):
                raise ValueError("the loader gave fewer batches to one member than to another")
            members += 1
    return [total / members for total in totals]


def _save(path: Path, member: Weights) -> None:
    """Written beside `path` and renamed: there is the old file or the whole new one, whenever it is interrupted."""
    from safetensors.torch import save_file

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # ranks may write the same member
    save_file({name: tensor.contiguous() for name, tensor in member.items()}, partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _load(path: Path) -> Weights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
