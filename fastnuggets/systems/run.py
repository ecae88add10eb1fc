"""One training of a system in a folder: what it was asked, its log, its checkpoint, its weights and its page."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

import fastnuggets
from fastnuggets.molecules.files import atomic_write, need
from fastnuggets.systems import find
from fastnuggets.systems.base import Draw, Section, System
from fastnuggets.training import processes
from fastnuggets.training.averaging import WeightAverager
from fastnuggets.training.fit import Checkpoint, Validation, fit
from fastnuggets.training.log import read_log

CONFIG, WEIGHTS, CHECKPOINT, BEST, LOG, PAGE = (
    "config.json",
    "model.safetensors",
    "checkpoint.pt",
    "best.pt",
    "log.csv",
    "report.html",
)
SAVED = 30.0  # seconds between checkpoints
AVERAGES = ("none", "ema", "swa")
_FILES = (CONFIG, WEIGHTS, CHECKPOINT, BEST, LOG, "log_validation.csv", PAGE, "result.json")


@dataclasses.dataclass(frozen=True)
class How:
    """What a training is told beside the settings of its system."""

    seed: int = 0
    device: str = "cpu"
    precision: str = "float32"
    average: str = "none"  # weights that are measured and kept: the last ones, or their mean along the way
    decay: float = 0.999  # of "ema"
    validations: int = 20  # in all
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.average not in AVERAGES:
            raise ValueError(f"average must be one of {', '.join(AVERAGES)}, got {self.average!r}")
        if self.validations < 1:
            raise ValueError(f"validations: expected at least 1, got {self.validations}")


def train(
    name: str,
    data: Path,
    out: Path,
    settings: dict[str, Any] | None = None,
    how: How | None = None,
    *,
    fresh: bool = False,
    progress: bool = True,
) -> dict[str, float]:
    """Train a system on the data of a file, from its checkpoint if `out` has one; returns its last validation.

    Args:
        name: of SYSTEMS.
        settings: fields of the system's Settings that are not to be the defaults.
        fresh: throw away what is in `out` and begin again.

    Writes config.json, log.csv, log_validation.csv, checkpoint.pt, and at the end model.safetensors (the best weights
    that validation saw), result.json and report.html. Under torchrun each process takes its share of every batch.

    Raises:
        ValueError: naming the setting; the data cannot be used; `out` holds another run.
        Interrupted: after Ctrl-C, with the checkpoint written.
    """
    how = how or How()
    kind = find(name)
    given = kind.Settings(**(settings or {}))
    device = _device(how.device)
    with processes.joined(device):
        if fresh and processes.rank() == 0:
            for file in _FILES:
                (out / file).unlink(missing_ok=True)
        facts, examples = kind.read(data, given, seed=how.seed, progress=progress and processes.rank() == 0)
        config = _config(name, given, how, facts)
        _claim(out, config)
        torch.manual_seed(how.seed)
        system = kind(given, facts)
        system.model.to(device)
        last = learn(system, examples, out, how, progress=progress)
        if processes.rank() == 0:
            _finish(system, examples, out, config, last)
    return last.validations[-1]


def load(out: Path, device: str = "cpu") -> System:
    """The trained system of a folder, ready to generate and evaluate.

    Raises FileNotFoundError if there is no finished run; ValueError if its files are not of this program or do not
    belong together.
    """
    config = read_config(out)
    weights = out / WEIGHTS
    if not weights.exists():
        raise FileNotFoundError(
            f"{weights}: the training is not finished; the same `fastnuggets train` goes on with it"
        )
    kind = find(config["system"])
    try:
        system = kind(kind.Settings(**config["settings"]), config["facts"])
        state = need("safetensors.torch", "systems").load_file(weights)
    except Exception as error:  # a Rust library's errors, and whatever damaged settings lead to
        raise ValueError(f"{out}: not a run of this program ({type(error).__name__}: {error})") from error
    ours = {key: tuple(value.shape) for key, value in system.model.state_dict().items()}
    theirs = {key: tuple(value.shape) for key, value in state.items()}
    for key in sorted({**ours, **theirs}):
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"{weights}: the weights of another model than {CONFIG} says: {key} is"
                f" {theirs.get(key, 'missing')}, expected {ours.get(key, 'none')}"
            )
    system.model.load_state_dict(state)
    system.model.to(_device(device)).eval()
    return system


def read_config(out: Path) -> dict[str, Any]:
    path = out / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no run in this folder")
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or not {"system", "settings", "facts"} <= config.keys():
            raise ValueError("not a configuration")
    except ValueError as error:
        raise ValueError(f"{path}: not the configuration of a run ({error})") from error
    return config


def _device(name: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _config(name: str, settings: Any, how: How, facts: dict[str, Any]) -> dict[str, Any]:
    config = {
        "system": name,
        "settings": dataclasses.asdict(settings),
        "how": dataclasses.asdict(how),
        "facts": facts,
    }
    return dict(json.loads(json.dumps(config)))  # as it will be read: lists for tuples


def _claim(out: Path, config: dict[str, Any]) -> None:
    """Write the configuration, or see that the one that is there is the same."""
    if (out / CONFIG).exists():
        found = read_config(out)
        for part in ("system", "settings", "how", "facts"):
            ours, theirs = config[part], found.get(part)
            if ours == theirs:
                continue
            names = part
            if isinstance(ours, dict) and isinstance(theirs, dict):
                names = ", ".join(sorted(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)))
            what = "of other data: " if part == "facts" else "with another "
            raise ValueError(f"{out}: holds a run {what}{names}; choose another folder, or begin anew (--fresh)")
    elif processes.rank() == 0:
        out.mkdir(parents=True, exist_ok=True)
        with atomic_write(out / CONFIG) as file:
            file.write((json.dumps({**config, "version": fastnuggets.__version__}, indent=1) + "\n").encode())


def learn(system: System, examples: Any, out: Path, how: How, *, progress: bool = True) -> Checkpoint:
    """Train the system, from its checkpoint if `out` has one; the weights that validation found best are in BEST."""
    system.begin(examples)
    steps = system.steps(examples)
    draw = Draw(how.seed, processes.rank(), processes.world())
    averager = None if how.average == "none" else _averager(system, how, steps)
    # Each process draws its own noise, and none that of the weights' beginning.
    torch.manual_seed(int(draw.generator(0, purpose=2).initial_seed()))
    return fit(
        system.model,
        lambda step: system.updates(examples, step, draw),
        system.optimizers(),
        steps=steps,
        schedule=lambda step: system.schedule(step, steps),
        checkpoint=out / CHECKPOINT,
        settings={"system": type(system).__name__, **dataclasses.asdict(system.settings), **dataclasses.asdict(how)},
        every=SAVED,
        clip=system.clip,
        progress=progress,
        averager=averager,
        validation=Validation(
            lambda: system.validate(examples), max(1, steps // how.validations), out / BEST, how.patience
        ),
        log=out / LOG,
        precision=how.precision,
    )


def _averager(system: System, how: How, steps: int) -> WeightAverager:
    if how.average == "ema":
        return WeightAverager(system.model, "ema", decay=how.decay, warmup="ratio")
    # The mean of the last quarter, as in SWA's publication; of the weights at about a hundred moments of it.
    return WeightAverager(system.model, "swa", start=3 * steps // 4, every=max(1, steps // 400))


def settle(system: System, examples: Any, out: Path) -> None:
    """After `learn`: take the weights that validation found best, and what the system chooses with them."""
    system.model.load_state_dict(torch.load(out / BEST, map_location=system.device, weights_only=True))
    system.model.eval()
    system.end(examples)


def _finish(system: System, examples: Any, out: Path, config: dict[str, Any], last: Checkpoint) -> None:
    settle(system, examples, out)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in system.model.state_dict().items()}
    with atomic_write(out / WEIGHTS) as file:
        file.write(need("safetensors.torch", "systems").save(state, {"system": config["system"]}))
    result = {"steps": last.step, "seconds": last.seconds, **last.validations[-1]}
    with atomic_write(out / "result.json") as file:
        file.write((json.dumps(result, indent=1) + "\n").encode())
    _page(system, examples, out, config, last)


def _page(system: System, examples: Any, out: Path, config: dict[str, Any], last: Checkpoint) -> None:
    """The page of the run, if matplotlib is there to draw it."""
    try:
        need("matplotlib")
    except ImportError as error:
        print(f"fastnuggets: no page of the run: {error}", file=sys.stderr)
        return
    from fastnuggets.figures import duration
    from fastnuggets.page import write_run

    with torch.no_grad():
        sections = [_curves(out), *system.sections(examples)]
    lead = f"{type(system).summary}. {last.step} steps in {duration(last.seconds)}."
    if paper := type(system).paper:
        lead += f" After {paper}."
    tables = {"Settings": config["settings"] | config["how"], "Data": _short(config["facts"])}
    write_run(out / PAGE, config["system"], lead, sections, tables)


def _short(facts: dict[str, Any]) -> dict[str, Any]:
    texts = {key: str(value) for key, value in facts.items()}
    return {key: text if len(text) <= 200 else f"{text[:200]} …" for key, text in texts.items()}


def _curves(out: Path) -> Section:
    from fastnuggets.figures import INK, chart, svg, table

    trained, validated = read_log(out / LOG), read_log(out / "log_validation.csv")
    parts = []
    for columns, label in ((trained, "training"), (validated, "held out")):
        for name in columns:
            if name in ("step", "seconds", "rate"):
                continue
            figure, axis = chart(4.4, 2.2)
            axis.plot(columns["step"], columns[name], linewidth=1.2)
            axis.set_title(f"{name}, {label}", color=INK, fontsize=10)
            parts.append(f"<div>{svg(figure, f'{name} by step, {label}')}</div>")
    best = table(
        ["", "last"],
        [(html.escape(name), f"{values[-1]:.4g}") for name, values in validated.items() if name != "step" and values],
    )
    return Section("How it went", f'<div class="two">{"".join(parts)}</div>{best}')
