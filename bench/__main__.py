"""`python -m bench`: times our kernels and their peers in turns, checks every result, prints and writes a table."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import average, blend, cases, report, sample, screen
from bench.cases import Contender, Group, Missing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sets, 5 repeats: a check that all runs, no figures")
    parser.add_argument("--only", metavar="NAME", help="groups whose family and name contain NAME")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=None, help="timed calls of each contender, default 25")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads to measure with")
    parser.add_argument("--out", default="bench/results", help="folder of the .md and .json")
    parser.add_argument("--readme", nargs="+", default=[], metavar="FILE", help="put the tables between FILE's markers")
    options = parser.parse_args()
    if options.quick and options.readme:
        parser.error("--readme: a quick run has no figures to print")
    threads = options.threads if options.device == "cpu" else [1]
    repeats = options.repeats or (5 if options.quick else 25)

    families = (cases, average, sample, blend, screen)
    every = [group for family in families for group in family.groups(options.device, options.quick)]
    chosen = [g for g in every if options.only is None or options.only in f"{g.family} {g.name}"]
    complete = sorted({g.family for g in every} - {g.family for g in every if g not in chosen})
    result = report.start(options.device, threads, repeats, options.quick, complete)
    for group in every:
        if group in chosen:
            print(f"{group.title} ...", file=sys.stderr, flush=True)
            here = group.environment.items() <= os.environ.items()
            how = group, options.device, threads, repeats, options.quick
            result["groups"].append(measure(*how) if here else measure_apart(*how))
    text = report.markdown(result)
    print(text)
    for path in report.write(result, text, options.out):
        print(f"written: {path}", file=sys.stderr)
    for path in options.readme:
        report.fill(path, result)
    return 0


def measure_apart(group: Group, device: str, threads: list[int], repeats: int, quick: bool) -> dict[str, Any]:
    """In a process of the group's environment."""
    command = [sys.executable, "-m", "bench", "--only", f"{group.family} {group.name}", "--device", device]
    command += ["--repeats", str(repeats), "--threads", *map(str, threads)] + ["--quick"] * quick
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, **group.environment}
        subprocess.run([*command, "--out", folder], env=environment, stdout=subprocess.DEVNULL, check=True)
        (path,) = Path(folder).glob("*.json")
        groups: list[dict[str, Any]] = json.loads(path.read_text())["groups"]
    return next(made for made in groups if made["name"] == group.name)


def measure(group: Group, device: str, threads: list[int], repeats: int, quick: bool) -> dict[str, Any]:
    """Errors first, then the times of all contenders, one call of each in turn, in an order that changes."""
    rows: list[dict[str, Any]] = []
    contenders: list[tuple[Contender, dict[str, Any]]] = []
    for contender in group.make():
        if isinstance(contender, Missing):
            rows.append({"name": contender.name, "note": f"not measured: {contender.why}"})
            continue
        torch.set_num_threads(max(threads))
        row: dict[str, Any] = {"name": contender.name, "against": contender.against, "ms": {}}
        output, row["extra_mb"] = report.extra_memory(contender.run, device)
        if contender.error is not None:
            row["error"], row["tolerance"] = contender.error(output), contender.tolerance
        row["note"] = contender.note
        del output
        rows.append(row)
        contenders.append((contender, row))
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    for count in threads:
        torch.set_num_threads(count)
        times: list[list[float]] = [[] for _ in contenders]
        order, shuffled = list(zip(contenders, times, strict=True)), random.Random(0)
        for turn in range(repeats + 2):
            shuffled.shuffle(order)  # or one would always find the memory as the same other one left it
            for (contender, _), measured in order:
                ms = [clock(contender.run) / contender.scale]
                while sum(ms) * contender.scale < group.turn_ms:
                    ms.append(clock(contender.run) / contender.scale)
                if turn >= 2:
                    measured.append(statistics.fmean(ms))
        for (_, row), measured in zip(contenders, times, strict=True):
            row["ms"][str(count)] = statistics.median(measured)
    gates = [] if quick else report.gates(group.gates, rows, threads)
    return {"name": group.name, "family": group.family, "title": group.title, "rows": rows, "gates": gates}


def _cpu_ms(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _cuda_ms(run: Callable[[], Any]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


if __name__ == "__main__":
    sys.exit(main())
