"""The fit loop: progress, checkpoints that survive any interruption, and resuming to the same bits."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastnuggets.training.averaging import WeightAverager


class Checkpoint(NamedTuple):
    """The state of a training between two steps, of tensors and plain values only."""

    step: int  # steps done
    seconds: float  # spent on them
    losses: list[float]  # of every step
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: Tensor  # torch's default CPU generator
    settings: dict[str, Any]
    averager: dict[str, Tensor] | None = None  # state of the averages, if there are any


class Interrupted(KeyboardInterrupt):
    """A signal ended the training after a whole step, and its checkpoint is written."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Written beside `path` and renamed: there is the old file or the whole new one, whenever it is interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        torch.save(checkpoint._asdict(), file)
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
    loss: Callable[[int], Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    schedule: Callable[[int], float],
    checkpoint: Path,
    settings: dict[str, Any],
    every: float = 10.0,
    clip: float = 1.0,
    progress: bool = True,
    averager: WeightAverager | None = None,
) -> Checkpoint:
    """Train to step `steps`, from the checkpoint if there is one.

    Args:
        loss: the loss of a step, from the model and from data that depend on the number of the step alone (or on
            torch's default CPU generator). Then an interrupted and resumed training gives the same bits as one that
            ran through, on the same machine with as many threads.
        schedule: learning rate of a step, as a factor of the optimizer's.
        checkpoint: file, written every `every` seconds, on SIGINT and SIGTERM, and at the end.
        settings: of str, int, float, bool and lists of them; a checkpoint of other settings is refused.
        clip: largest norm of all gradients together.
        progress: a bar on stderr, if that is a terminal.
        averager: of the model; updated after each step, by `fit` or by the optimizer it was given to, and kept in the
            checkpoint. Going on from a checkpoint without one, the averages begin there.

    Returns:
        the last checkpoint; the model holds its weights.

    Raises:
        Interrupted: after SIGINT or SIGTERM, once the step under way is done and the checkpoint written.
        ValueError: the checkpoint is damaged, of other settings, or has averages and no averager is given.
        RuntimeError: the loss is not finite.
    """
    base = [group["lr"] for group in optimizer.param_groups]
    step, seconds, losses = _resume(model, optimizer, averager, checkpoint, settings)

    def state() -> Checkpoint:
        weights, moments = model.state_dict(), optimizer.state_dict()
        averages = None if averager is None else averager.state_dict()
        return Checkpoint(step, seconds, list(losses), weights, moments, torch.get_rng_state(), settings, averages)

    model.train()
    saved = time.monotonic()
    with _bar(steps, step, progress) as bar, _signals() as caught:
        while step < steps:
            began = time.monotonic()
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * schedule(step)
            value = _step(model, loss(step), optimizer, clip)
            if averager is not None and averager.updated_by is not optimizer:
                averager.update()
            losses.append(value)
            step += 1
            seconds += time.monotonic() - began
            bar.update()
            bar.set_postfix_str(f"loss {value:.3f}", refresh=False)
            if caught or step == steps or time.monotonic() - saved > every:
                save_checkpoint(checkpoint, state())
                saved = time.monotonic()
            if caught:
                raise Interrupted
    return state()


def _resume(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    averager: WeightAverager | None,
    path: Path,
    settings: dict[str, Any],
) -> tuple[int, float, list[float]]:
    found = load_checkpoint(path)
    if found is None:
        return 0, 0.0, []
    changed = sorted(
        key for key in {**found.settings, **settings} if found.settings.get(key, ...) != settings.get(key, ...)
    )
    if changed:
        raise ValueError(f"{path}: a training with another {', '.join(changed)}")
    if averager is None and found.averager is not None:
        raise ValueError(f"{path}: a training with averages: give its averager")
    model.load_state_dict(found.model)
    optimizer.load_state_dict(found.optimizer)
    if averager is not None and found.averager is not None:
        averager.load_state_dict(found.averager)
    torch.set_rng_state(found.rng)
    return found.step, found.seconds, found.losses


def _step(model: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> float:
    value = loss.item()
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss became {value}; the last checkpoint is from before that")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return value


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
