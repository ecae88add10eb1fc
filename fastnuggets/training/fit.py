"""The fit loop: progress, checkpoints that survive any interruption, and resuming to the same bits."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnuggets.training import processes
from fastnuggets.training.averaging import WeightAverager
from fastnuggets.training.log import CsvLog

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Checkpoint(NamedTuple):
    """The state of a training between two steps, of tensors and plain values only."""

    step: int  # steps done
    seconds: float  # spent on them
    losses: list[float]  # of every step; of several updates in a step, the last one's
    model: dict[str, Tensor]
    optimizers: list[dict[str, Any]]
    rng: Tensor  # [processes, ...] torch's default CPU generators
    settings: dict[str, Any]
    averager: dict[str, Tensor] | None = None  # state of the averages, if there are any
    validations: tuple[dict[str, float], ...] = ()  # with the step of each
    scaler: dict[str, Any] | None = None  # of float16
    device_rng: Tensor | None = None  # [processes, ...] of the devices, if these are CUDA


class Update(NamedTuple):
    """A loss and who minimises it. A step may have several, as adversaries take turns."""

    name: str
    optimizer: torch.optim.Optimizer
    loss: Tensor  # scalar
    clip: float | None = None  # largest norm of the gradients of the optimizer's tensors; None for fit's


class Validation(NamedTuple):
    """Figures of examples that are not trained on, taken while training goes on."""

    measure: Callable[[], dict[str, float]]  # of the first, less is better; the model is in evaluation mode
    every: int  # steps
    best: Path  # the weights that measured best are kept here
    patience: int | None = None  # stop after so many validations without a better one


class Interrupted(KeyboardInterrupt):
    """A signal ended the training after a whole step, and its checkpoint is written."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Written beside `path` and renamed: there is the old file or the whole new one, whenever it is interrupted."""
    _write(path, checkpoint._asdict())


def _write(path: Path, state: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint, or None where there is none. ValueError if the file is no checkpoint; runs no code from it."""
    if not path.exists():
        return None
    try:
        return Checkpoint(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise ValueError(f"{path}: not a checkpoint of this program ({type(error).__name__})") from error


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor | Iterator[Update]],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    steps: int,
    schedule: Callable[[int], float],
    checkpoint: Path,
    settings: dict[str, Any],
    every: float = 10.0,
    clip: float = 1.0,
    progress: bool = True,
    averager: WeightAverager | None = None,
    validation: Validation | None = None,
    log: Path | None = None,
    precision: str = "float32",
) -> Checkpoint:
    """Train to step `steps`, from the checkpoint if there is one.

    Under torchrun every process trains on examples of its own and gradients are averaged; buffers such as those of
    batch normalisation are the first process's, which alone writes files.

    Args:
        loss: the loss of a step, from the model and from data that depend on the number of the step alone (or on
            torch's default generators). Then an interrupted and resumed training gives the same bits as one that
            ran through, on the same machine with as many threads. Adversaries: a generator of `Update`, each made
            after the one before it was minimised.
        optimizer: one, or all that the updates name.
        schedule: learning rate of a step, as a factor of the optimizers'.
        checkpoint: file, written every `every` seconds, on SIGINT and SIGTERM, and at the end.
        settings: of str, int, float, bool and lists of them; a checkpoint of other settings is refused.
        clip: largest norm of all gradients of an update together.
        progress: a bar on stderr, if that is a terminal.
        averager: of the model; updated after each step, by `fit` or by the optimizer it was given to, and kept in the
            checkpoint. Going on from a checkpoint without one, the averages begin there.
        validation: of the averages, once there are any.
        log: CSV file of each step's losses; validations go to a file beside it, NAME_validation.csv.
        precision: "float32", or "bfloat16" or (CUDA only) "float16" for autocast.

    Returns:
        the last checkpoint; the model holds its weights.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once the step under way is done and the checkpoint written.
        ValueError: the checkpoint is damaged, of other settings, or has averages and no averager is given.
        RuntimeError: the loss is not finite.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else list(optimizer)
    training = _Training(model, optimizers, averager, clip, precision, settings, validation)
    base = [[group["lr"] for group in each.param_groups] for each in optimizers]
    training.resume(checkpoint)
    first = processes.rank() == 0
    logs = _logs(log, training.step) if first else []

    def save() -> None:
        state = training.state()
        if first:
            for each in logs:
                each.flush()
            save_checkpoint(checkpoint, state)

    model.train()
    saved = time.monotonic()
    with _bar(steps, training.step, progress and first) as bar, _signals() as caught:
        while training.step < steps and not training.stopped():
            rate = schedule(training.step)
            for each, rates in zip(optimizers, base, strict=True):
                for group, lr in zip(each.param_groups, rates, strict=True):
                    group["lr"] = lr * rate
            losses = training.take(loss)
            measured = training.validate() if validation is not None and training.due(steps) else None
            if logs:
                logs[0].add(training.step, {"seconds": training.seconds, "rate": rate, **losses})
                if measured is not None:
                    logs[1].add(training.step, measured)
            bar.update()
            bar.set_postfix_str(", ".join(f"{name} {value:.3f}" for name, value in losses.items()), refresh=False)
            ended = training.step == steps or training.stopped()
            stop, late = processes.any_of((bool(caught), time.monotonic() - saved > every), training.device)
            if stop or late or ended:
                save()
                saved = time.monotonic()
            if stop:
                raise Interrupted
    return training.state()


def _logs(path: Path | None, step: int) -> list[CsvLog]:
    if path is None:
        return []
    return [CsvLog(path, step), CsvLog(path.with_name(f"{path.stem}_validation.csv"), step)]


class _Training:
    """What changes from step to step, and all that a checkpoint must hold of it."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        averager: WeightAverager | None,
        clip: float,
        precision: str,
        settings: dict[str, Any],
        validation: Validation | None,
    ) -> None:
        self.model, self.optimizers, self.averager = model, optimizers, averager
        self.clip, self.validation = clip, validation
        self.device = next(model.parameters()).device
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if precision == "float16" and self.device.type != "cuda":
            raise ValueError("precision: float16 is for CUDA; on the CPU there is bfloat16")
        self.dtype = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "float16")
        # Another number of processes takes other examples in each step.
        self.settings = settings | ({"processes": processes.world()} if processes.world() > 1 else {})
        self.step, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.validations: list[dict[str, float]] = []

    def resume(self, path: Path) -> None:
        found = load_checkpoint(path)
        if found is not None:
            self._check(path, found)
            self.model.load_state_dict(found.model)
            for optimizer, state in zip(self.optimizers, found.optimizers, strict=True):
                optimizer.load_state_dict(state)
            if self.averager is not None and found.averager is not None:
                self.averager.load_state_dict(found.averager)
            if found.scaler:
                self.scaler.load_state_dict(found.scaler)
            torch.set_rng_state(found.rng[processes.rank()])
            if found.device_rng is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(found.device_rng[processes.rank()], self.device)
            self.step, self.seconds, self.losses = found.step, found.seconds, found.losses
            self.validations = list(found.validations)
        processes.share([*self.model.parameters(), *self.model.buffers()])

    def _check(self, path: Path, found: Checkpoint) -> None:
        ours, theirs = self.settings, found.settings
        changed = sorted(key for key in {**theirs, **ours} if theirs.get(key, ...) != ours.get(key, ...))
        if changed:
            raise ValueError(f"{path}: a training with another {', '.join(changed)}")
        if self.averager is None and found.averager is not None:
            raise ValueError(f"{path}: a training with averages: give its averager")

    def state(self) -> Checkpoint:
        return Checkpoint(
            self.step,
            self.seconds,
            list(self.losses),
            self.model.state_dict(),
            [optimizer.state_dict() for optimizer in self.optimizers],
            processes.gathered(torch.get_rng_state()),
            self.settings,
            None if self.averager is None else self.averager.state_dict(),
            tuple(self.validations),
            self.scaler.state_dict() or None,
            processes.gathered(torch.cuda.get_rng_state(self.device)) if self.device.type == "cuda" else None,
        )

    def take(self, loss: Callable[[int], Tensor | Iterator[Update]]) -> dict[str, float]:
        """One step; the loss of each of its updates."""
        began = time.monotonic()
        turns = self._turns(loss)
        values: dict[str, float] = {}
        while True:
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                update = next(turns, None)
            if update is None:
                break
            values[update.name] = self._minimise(update)
        self.scaler.update()
        processes.share(list(self.model.buffers()))
        if self.averager is not None and self.averager.updated_by not in self.optimizers:
            self.averager.update()
        self.losses.append([math.nan, *values.values()][-1])
        self.step += 1
        self.seconds += time.monotonic() - began
        return values

    def _turns(self, loss: Callable[[int], Tensor | Iterator[Update]]) -> Iterator[Update]:
        made = loss(self.step)
        if isinstance(made, Tensor):
            yield Update("loss", self.optimizers[0], made)
        else:
            yield from made

    def _minimise(self, update: Update) -> float:
        parameters = [p for group in update.optimizer.param_groups for p in group["params"]]
        # All of the model's, as a loss also reaches networks that another optimizer has.
        self.model.zero_grad(set_to_none=True)
        value = update.loss.item()
        if math.isfinite(value):
            self.scaler.scale(update.loss).backward()
        value = processes.mean_gradients(parameters, value, self.device)
        if not math.isfinite(value):
            raise RuntimeError(f"the {update.name} became {value}; the last checkpoint is from before that")
        self.scaler.unscale_(update.optimizer)
        nn.utils.clip_grad_norm_(parameters, self.clip if update.clip is None else update.clip)
        self.scaler.step(update.optimizer)
        return value

    def due(self, steps: int) -> bool:
        return self.validation is not None and (self.step % self.validation.every == 0 or self.step == steps)

    def validate(self) -> dict[str, float]:
        """Figures of the held-out examples; the best weights are written."""
        assert self.validation is not None
        self.model.eval()
        averages = self.averager is not None and self.averager.count > 0
        lent = self.averager.swapped() if averages else contextlib.nullcontext()
        # Whatever is drawn here, training goes on as if it had not been.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.no_grad(), lent:
            measured = processes.of_the_first(self.validation.measure)
            self.validations.append(measured)
            if self._stale() == 0 and processes.rank() == 0:
                _write(self.validation.best, self.model.state_dict())
        self.model.train()
        return measured

    def _stale(self) -> int:
        """Validations since the best one."""
        values = [next(iter(row.values())) for row in self.validations]
        values = [math.inf if math.isnan(value) else value for value in values]
        return len(values) - 1 - values.index(min(values))

    def stopped(self) -> bool:
        """If validations have not become better for as long as patience lasts."""
        if self.validation is None or self.validation.patience is None or not self.validations:
            return False
        return self._stale() >= self.validation.patience


def _bar(steps: int, step: int, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=step, unit="step", desc="training", disable=None if progress else True)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them: a step half done must not reach a checkpoint."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python runs signal handlers in the main thread only
        return
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, _: caught.append(number)) for kind in kinds]
    try:
        yield caught
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
