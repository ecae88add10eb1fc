"""The average of a model's weights along its training: SWA, EMA and SWAG."""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnuggets.ops.average import ROUNDINGS
from fastnuggets.training import averaging_state as states
from fastnuggets.training.averaging_store import FLOATS, Layout, Step, Store
from fastnuggets.training.decay import EmaDecay
from fastnuggets.training.tensors import Walk, to_raw, wrapped
from fastnuggets.training.weights import unwrap

_MODES = ("swa", "ema", "swag")
_BUFFERS = ("average", "copy", "recompute")
_NONFINITE = ("propagate", "refuse", "skip")


class _Saved(NamedTuple):
    """The training weights while the model holds averages."""

    which: int
    swapped: list[str]  # those that lie where the average was
    copies: dict[str, Tensor]  # the others


class WeightAverager:
    """Averages a model's weights while it is trained, and lends them to the model.

    ::

        average = WeightAverager(model, "ema", decay=0.999)
        for batch in loader:
            step(model, batch)
            average.update()
        with average.swapped():
            evaluate(model)

    An update is one pass over the weights; its cost on the host does not grow with what a model is made of. Until the
    first update the averages are the weights of the beginning; the first update copies the weights, whatever the
    decay. Tensors go by name, without the prefixes of ``torch.compile``, DistributedDataParallel and DataParallel,
    tied weights once. Parameters that are replaced or moved are followed; one that is added, missing or of another
    shape is an error. Integers are never averaged: they are taken from the model when the averages are next used.
    Shards of a DTensor (FSDP2, tensor parallel) are averaged where they are, without communication.

    Args:
        model: may be compiled or wrapped. It is not copied.
        mode: "swa", the mean of all updates; "ema", exponential moving averages; "swag", the mean, the variance and
            the last ``rank`` deviations, from which weights can be drawn.
        decay: of "ema": a number, an `EmaDecay` for all the settings of a warm-up, or several of these: one average
            each, in one pass. Methods take the number of the average as ``which``. Default 0.999.
        warmup: of the decays that are given as numbers: None, "power", "ratio" or "debias"; see `EmaDecay`.
        start: so many calls of `update` do nothing; every: of the calls then, the first of each so many counts.
        dtype: of the averages. Default: that of the weights, but float32 for half and, if rounding is "nearest",
            bfloat16.
        rounding: of bfloat16 averages: "nearest"; "stochastic", right on the average; "compensated", exact with two
            more bytes an element. See `fastnuggets.ops.ema_update_`.
        seed: of the stochastic rounding.
        device: of the averages. Default: that of each weight. With "cpu" and a model on CUDA an update queues copies
            into pinned memory and returns; a thread averages them when they are there. What went wrong in it is raised
            by the next use of the averages.
        buffers: "average", integers excepted; "copy": taken from the model in each update; "recompute": taken from
            the model when the averages are first used after an update, and then left to
            `fastnuggets.training.update_bn` inside `swapped`, whose result is kept until the next update.
        include, exclude: patterns (fnmatch) of names. What is not included or is excluded is not averaged and stays
            in the model as it is.
        nonfinite: weights that hold an inf or a NaN: "propagate"; "refuse": `update` raises and leaves the averages
            alone; "skip": `update` leaves them alone and returns False. The last two synchronise, and for DTensors
            communicate, so that all ranks decide alike.
        rank: of "swag": deviations that are kept; 0 for the diagonal alone.

    Raises:
        ValueError, TypeError: naming the argument or the parameter, what it must be and what it was.

    Warns:
        UserWarning: of averages in half precision that are rounded to nearest: they stand still.

    Deterministic. `update` does not synchronise but for ``nonfinite``. From its second call on it can be captured in a
    CUDA graph, which repeats the decay and the random numbers of that call: for "ema" with a constant decay, rounded to
    nearest. P. Izmailov et al., UAI 2018, arXiv:1803.05407 (SWA); W. Maddox et al.,
    NeurIPS 2019, arXiv:1902.02476 (SWAG).
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "swa",
        decay: float | EmaDecay | Sequence[float | EmaDecay] | None = None,
        *,
        warmup: str | None = None,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype | None = None,
        rounding: str = "nearest",
        seed: int = 0,
        device: torch.device | str | None = None,
        buffers: str = "average",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] = (),
        nonfinite: str = "propagate",
        rank: int = 20,
    ) -> None:
        for name, value, allowed in (
            ("mode", mode, _MODES),
            ("rounding", rounding, ROUNDINGS),
            ("buffers", buffers, _BUFFERS),
            ("nonfinite", nonfinite, _NONFINITE),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        for name, number, least in (("start", start, 0), ("every", every, 1), ("rank", rank, 0)):
            if number < least:
                raise ValueError(f"{name} must be at least {least}, got {number}")
        swag = mode == "swag"
        if swag and rank == 1:
            raise ValueError("rank must be 0 or at least 2: a single deviation has no covariance")
        if dtype is not None and dtype not in (FLOATS[:2] if swag else FLOATS):
            raise ValueError(f"dtype must be {'float32 or float64' if swag else 'a floating-point type'}, got {dtype}")
        self.model, self.mode, self.decays = model, mode, _decays(mode, decay, warmup)
        self.start, self.every, self.seed, self.nonfinite = start, every, seed, nonfinite
        self.count = 0  # updates that the averages hold
        self.calls = 0  # of update()
        self._layout = Layout(
            sets=len(self.decays) or 1,
            moments=swag,
            rank=rank if swag else 0,
            dtype=dtype,
            rounding=rounding,
            device=None if device is None else torch.empty(0, device=device).device,  # with its index
            buffers=buffers,
            include=(include,) if isinstance(include, str) else include,
            exclude=(exclude,) if isinstance(exclude, str) else exclude,
        )
        self._store = Store(model, self._layout)
        self._stale = False  # whether there was an update since tensors were fetched
        self._saved: _Saved | None = None
        self._worker: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None
        self._owner: weakref.ref[Any] | None = None
        self._warn()

    # ---- the update ------------------------------------------------------------------------------------------------

    def update(self) -> bool:
        """Takes the model's weights into the averages; False if this call was not one that counts.

        Raises:
            RuntimeError: inside `swapped`, or an optimizer was given these averages to update them in its steps.
            ValueError: the model has other names or shapes than before.
            FloatingPointError: by ``nonfinite="refuse"``, naming the parameter.
        """
        self._check_at_home("update()")
        if (owner := self.updated_by) is not None:
            raise RuntimeError(
                f"{type(owner).__name__}.step() updates these averages: leave update() out, or set the optimizer's "
                "averager to None"
            )
        return self._update()

    @property
    def updated_by(self) -> Any:
        """The optimizer whose steps update the averages, or None; see `fastnuggets.training.AveragedSGD`."""
        owner = self._owner() if self._owner is not None else None
        return owner if owner is not None and owner.averager is self else None

    def _due(self) -> bool:
        """Whether the next call of `update` counts."""
        return self.calls >= self.start and (self.calls - self.start) % self.every == 0

    def _update(self, step: Step | None = None) -> bool:
        """`update`, also for an optimizer, which may give the step that updates averages on its way."""
        due = self._due()
        self.calls += 1
        if not due:
            return False
        if step is None:
            self._follow()
        if self.nonfinite != "propagate" and not self._finite():
            return False
        decays = [decay.at(self.count) for decay in self.decays]
        self._finish()
        if self._store.stage():
            self._pending = self._thread().submit(self._store.average, self.count, decays, self.seed)
        else:
            self._store.average(self.count, decays, self.seed, step)
        if self._layout.buffers == "copy":
            self._store.copy("copied")
        self.count += 1
        self._stale = True
        return True

    def _finite(self) -> bool:
        bad = self._store.nonfinite()
        if bad is None:
            return True
        if self.nonfinite == "skip":
            return False
        raise FloatingPointError(
            f"{bad or 'a shard on another rank'} holds an inf or a NaN; the averages are as before"
        )

    def _thread(self) -> ThreadPoolExecutor:
        self._worker = self._worker or ThreadPoolExecutor(1, "fastnuggets average")
        return self._worker

    def _finish(self) -> None:
        """Waits for the update under way, if there is one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _follow(self) -> None:
        if not self._store.unchanged():
            self._finish()
            self._store.bind()

    def _check_at_home(self, what: str) -> None:
        if self._saved is not None:
            raise RuntimeError(f"{what} while the model holds averages: leave swapped() first")

    def _settle(self, what: str) -> None:
        """Makes the averages ready to be looked at."""
        self._check_at_home(what)
        self._finish()
        self._follow()
        if self._stale:
            self._store.copy("fetched")
            self._stale = False

    def _warn(self) -> None:
        halves = (torch.float16, torch.bfloat16) if self._layout.rounding == "nearest" else (torch.float16,)
        dtypes = {name: self._store.held(name).dtype for name in self._store.names("averaged")}
        name = next((name for name, dtype in dtypes.items() if dtype in halves), None)
        if name is not None:
            warnings.warn(
                f"the average of {name} is rounded to the nearest {str(dtypes[name]).removeprefix('torch.')} and will "
                "stand still at decays near 1: average in float32, or choose another rounding",
                UserWarning,
                stacklevel=3,
            )

    # ---- the averages in the model ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def swapped(self, which: int = 0) -> Iterator[nn.Module]:
        """The model holds the averages inside, and its own weights again after, also after an exception.

        Weights and averages of one type change places, without further memory; of others the weights are copied.
        Running statistics that `update_bn` computes inside are kept with the averages if they are not averaged
        themselves.
        """
        self._settle("swapped()")
        self.swap(which)
        try:
            yield self.model
        finally:
            if self._saved is not None:
                self.swap()

    def swap(self, which: int = 0) -> None:
        """Puts the averages into the model; the next call brings the training weights back."""
        if self._saved is not None:
            self._swap_out(self._saved)
            return
        self._check_which(which)
        self._settle("swap()")
        store = self._store
        names = [name for name in store.kinds if store.is_exchangeable(name, which)]
        copies = {name: store.walk.raw[name].detach().clone() for name in store.kinds if name not in set(names)}
        store.exchange(names, which)
        with torch.no_grad():
            for name in copies:
                store.walk.raw[name].copy_(store.held(name, which))
        self._saved = _Saved(which, names, copies)

    @torch.no_grad()
    def _swap_out(self, saved: _Saved) -> None:
        self._follow()
        store = self._store
        store.exchange(saved.swapped, saved.which)
        for name, weight in saved.copies.items():
            if store.kinds[name] != "averaged":
                store.held(name).copy_(store.walk.raw[name])
            store.walk.raw[name].copy_(weight)
        self._saved = None

    def sample(self, seed: int = 0, *, scale: float | None = None) -> None:
        """Weights drawn from SWAG's Gaussian, into the model: the same seed gives the same weights.

        Inside `swapped` any number of times. Outside, the training weights are saved, and `swap` brings them back.
        Statistics of BatchNorm layers belong to the weights: follow it with `update_bn`.

        Args:
            scale: factor of the covariance. Default: the paper's, 0.5, and 1 if ``rank`` is 0.

        Raises:
            RuntimeError: another mode than "swag". ValueError: fewer than two updates (one if ``rank`` is 0).
        """
        if self.mode != "swag":
            raise RuntimeError(f'sample() needs mode="swag", got {self.mode!r}')
        least = 2 if self._layout.rank else 1
        if self.count < least:
            raise ValueError(f"sample() needs at least {least} updates, got {self.count}")
        if self._saved is None:
            self.swap()
        self._store.sample(self.count, seed, scale)
        self._store.walk.reshard()

    # ---- the averages outside it -----------------------------------------------------------------------------------

    @property
    def averages(self) -> dict[str, Tensor]:
        """The averages by name, buffers too; views that later updates change. DTensors where the model has them."""
        return self.average()

    def average(self, which: int = 0) -> dict[str, Tensor]:
        """`averages` of one of several decays."""
        self._check_which(which)
        self._settle("averages")
        store = self._store
        return {name: wrapped(store.held(name, which), store.walk.tensors[name]) for name in store.kinds}

    def export(self, which: int = 0) -> dict[str, Tensor]:
        """A state dict of the bare model with the averages in it; copies, of the averages' types.

        What is not averaged is as in the model; tied weights stand under each of their names.
        """
        averages = self.average(which)
        aliases = self._store.walk.aliases
        return states.bare(unwrap(self.model), lambda name: averages.get(aliases.get(name, name)))

    def full_state_dict(self, which: int = 0, *, everywhere: bool = False) -> dict[str, Tensor]:
        """`export` with shards gathered, on the CPU, on rank 0; empty on others unless ``everywhere``. A collective."""
        return states.gathered(self.export(which), everywhere)

    def copy_to(self, model: nn.Module, which: int = 0) -> None:
        """Writes the averages over the tensors of the same names of another model.

        Raises:
            ValueError: it has no tensor of a name, or of another shape.
        """
        target = Walk(model)
        with torch.no_grad():
            for name, average in self.average(which).items():
                into = target.tensors.get(target.aliases.get(name, name))
                if into is None or into.shape != average.shape:
                    found = "none" if into is None else list(into.shape)
                    raise ValueError(f"{name} must be {list(average.shape)} in the model, got {found}")
                target.raw[target.aliases[name]].copy_(to_raw(average, into))

    def module(self, which: int = 0) -> nn.Module:
        """A deep copy of the bare model that holds the averages."""
        inner = unwrap(self.model)
        # deepcopy refuses results of a computation that a module keeps, as old-style weight_norm does.
        kept = (value for module in inner.modules() for value in vars(module).values() if isinstance(value, Tensor))
        memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept if not value.is_leaf}
        made = copy.deepcopy(inner, memo)
        self.copy_to(made, which)
        return made

    def _check_which(self, which: int) -> None:
        if not 0 <= which < self._layout.sets:
            raise ValueError(f"which must be in 0..{self._layout.sets - 1}, got {which}")

    # ---- state -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that a training needs to go on to the same bits: tensors only, for torch.save and for safetensors.

        The settings and the counters are JSON in a tensor of bytes. The others are the averages themselves, which later
        updates change, or copies where their layout is not contiguous.
        """
        self._settle("state_dict()")
        tensors = {
            f"{column}/{name}": wrapped(tensor.contiguous(), self._store.walk.tensors[name])
            for column, held in self._store.columns.items()
            for name, tensor in held.items()
        }
        return {"settings": states.pack({**self._settings(), "count": self.count, "calls": self.calls}), **tensors}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Goes on where `state_dict` was taken.

        Args:
            strict: refuse other settings than those given here; otherwise those given here count, if the tensors fit.

        Raises:
            ValueError: no state of a WeightAverager (see `load_averages` for others), other settings, or other names
                or shapes; then nothing has changed.
        """
        self._settle("load_state_dict()")
        found = states.unpack(state)
        if strict:
            states.check_settings(found, self._settings())
        slots = {
            f"{column}/{n}": (n, tensor) for column, held in self._store.columns.items() for n, tensor in held.items()
        }
        states.check_names({key for key in state if key != "settings"}, slots.keys())
        values = {key: to_raw(state[key], self._store.walk.tensors[name]) for key, (name, _) in slots.items()}
        for key, (_, tensor) in slots.items():
            if values[key].shape != tensor.shape or values[key].dtype != tensor.dtype:
                raise ValueError(f"{key} must be {states.kind(tensor)}, got {states.kind(values[key])}")
        for key, (_, tensor) in slots.items():
            tensor.copy_(values[key])
        self.count, self.calls = found["count"], found["calls"]

    @torch.no_grad()
    def load_averages(self, state: Mapping[str, Any], which: int = 0, *, count: int | None = None) -> None:
        """Takes averages from elsewhere: a bare state dict, or what other libraries save.

        Known are ``torch.optim.swa_utils.AveragedModel``, ema-pytorch, timm (its checkpoints' ``state_dict_ema``, or
        a bare state dict), the lists of diffusers and torch-ema (in the order of the model's parameters) and
        checkpoints of Lightning's WeightAveraging. Buffers that it lacks are left as they are.

        Args:
            count: of the updates in it. Default: what it says, or else 1.

        Raises:
            ValueError: a parameter is missing or of another shape, a name is unknown; mode is "swag"; no count.
        """
        if self.mode == "swag":
            raise ValueError("averages alone do not make a SWAG: it needs the moments too")
        self._check_which(which)
        self._settle("load_averages()")
        walk = self._store.walk
        values, said = states.foreign(state, [name for name in walk.tensors if name not in walk.buffers])
        count = said if count is None else count
        if count is None and self.mode == "swa":
            raise ValueError("this state does not say how many updates it holds: give count")
        for name, value in states.matched(values, walk, self._store.kinds).items():
            self._store.put(name, value, which)
        self.count = 1 if count is None else count
        self.calls = self.start + (self.count - 1) * self.every + 1 if self.count else 0

    def averaged_model_state(self, which: int = 0) -> dict[str, Tensor]:
        """A state dict for ``torch.optim.swa_utils.AveragedModel`` of the bare model."""
        named = {f"module.{name}": value for name, value in self.export(which).items()}
        return {"n_averaged": torch.tensor(self.count), **named}

    def _settings(self) -> dict[str, Any]:
        ours = {name: getattr(self, name) for name in ("mode", "seed", "start", "every")}
        theirs = {name: getattr(self._layout, name) for name in ("rounding", "buffers", "rank")}
        return {**ours, **theirs, "decays": [asdict(decay) for decay in self.decays]}


def _decays(
    mode: str, decay: float | EmaDecay | Sequence[float | EmaDecay] | None, warmup: str | None
) -> tuple[EmaDecay, ...]:
    if mode != "ema":
        if decay is not None or warmup is not None:
            raise ValueError(f'decay and warmup belong to mode="ema", got mode={mode!r}')
        return ()
    given = 0.999 if decay is None else decay
    many = given if isinstance(given, Sequence) else [given]
    if not many:
        raise ValueError("decay must be a number or several, got none")
    return tuple(one if isinstance(one, EmaDecay) else EmaDecay(one, warmup) for one in many)
