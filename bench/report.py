"""From measured rows to tables, files and README sections."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.cases import CHECKED, Gate

Row = dict[str, Any]

METHOD = (
    "All contenders of a table take turns in one process, in an order that changes, and write to an output that exists "
    "already if they can. A turn is one call; of blends, whose calls are short, the mean of as many as take 3 ms. The "
    f"error is the largest against float64, relative to the largest value (of grids over the first {CHECKED} "
    "molecules); where it is too large, of ours or of the peer, no ratio is given. Extra memory is what the first call "
    "adds to what was there."
)


def start(device: str, threads: list[int], repeats: int, quick: bool, complete: list[str]) -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "chip": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "device": device,
        "torch": torch.__version__,
        "threads": threads,
        "repeats": repeats,
        "quick": quick,
        "complete": complete,
        "groups": [],
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(re.findall(r"^([\w ]+?)\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE))
        family = f"family {fields.get('cpu family')} model {fields.get('model')}"
        return f"{fields.get('model name', platform.machine())} ({family})"
    return platform.processor() or platform.machine()


def extra_memory(run: Callable[[], Any], device: str) -> tuple[Any, float | None]:
    """What the first call returns, and by how much memory in use rose meanwhile, in MB (None: cannot be told)."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = run()
        torch.cuda.synchronize()
        return output, (torch.cuda.max_memory_allocated() - before) / 1e6
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
        before = _peak_resident()
    except OSError:
        return run(), None
    output = run()
    return output, (_peak_resident() - before) / 1e6


def _peak_resident() -> int:  # bytes
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise OSError("no VmHWM in /proc/self/status")
    return 1024 * int(match[1])


def right(row: Row) -> bool:
    return bool(row.get("error", 0.0) <= row.get("tolerance", 0.0))


def gates(demands: list[Gate], rows: list[Row], threads: list[int]) -> list[Row]:
    """Each gate with what was measured and, for each number of threads, whether it is reached."""
    by_name = {row["name"]: row for row in rows if "ms" in row}
    results = []
    for gate in demands:
        tops = [by_name[name] for name in _names(gate.top) if name in by_name]
        bottoms = [by_name[name] for name in _names(gate.bottom) if name in by_name]
        missing = not tops or (gate.bottom is not None and not bottoms)
        result: Row = {"name": gate.name, "at_most": gate.at_most, "threads": {}}
        for count, must in zip((1, 2), gate.must, strict=True):
            if must is None or count not in threads:
                continue
            cell: Row = {"must": must}
            if missing:
                cell["verdict"] = "not measured"
            elif not all(map(right, tops + bottoms)):
                cell["verdict"] = "wrong result"
            else:
                top = min(row["ms"][str(count)] for row in tops)
                cell["value"] = value = top / bottoms[0]["ms"][str(count)] if bottoms else 1e3 / top
                cell["verdict"] = "reached" if (value <= must if gate.at_most else value >= must) else "missed"
            result["threads"][str(count)] = cell
        results.append(result)
    return results


def _names(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given or ()


def markdown(result: dict[str, Any]) -> str:
    lines = [_machine(result), "", METHOD]
    if result["quick"]:
        lines += ["", "**A quick run of 8 molecules: it shows that everything runs, its times mean nothing.**"]
    for group in result["groups"]:
        lines += ["", f"### {group['title']}", "", *table(group, result)]
        lines += ["", *gate_table(group["gates"])] if group["gates"] else []
    return "\n".join(lines) + "\n"


def _machine(result: dict[str, Any]) -> str:
    return (
        f"{result['date']} · {result['chip']} · {result['device']} · torch {result['torch']} · "
        f"median of {result['repeats']} calls"
    )


def table(group: dict[str, Any], result: dict[str, Any]) -> list[str]:
    rows, threads = {row["name"]: row for row in group["rows"]}, result["threads"]
    unit = ["ms"] if result["device"] == "cuda" else [f"ms, {n} thread{'s' if n > 1 else ''}" for n in threads]
    lines = _table_head(["", *unit, "time / ours", "largest error", "extra MB", ""])
    for row in rows.values():
        if "ms" not in row:
            lines.append(f"| {row['name']} |{' |' * (len(threads) + 3)} {row['note']} |")
            continue
        times = [f"{row['ms'][str(n)]:.3g}" for n in threads]
        ours = rows.get(row["against"] or "")
        gain = ""
        if ours is not None:
            ratios = [f"{row['ms'][str(n)] / ours['ms'][str(n)]:.3g}x" for n in threads]
            gain = " / ".join(ratios) if right(row) and right(ours) else "wrong result: no figure"
        error = f"{row['error']:.1e}{'' if right(row) else ' **(too large)**'}" if "error" in row else ""
        memory = "" if row["extra_mb"] is None else f"{row['extra_mb']:.0f}"
        lines.append("| " + " | ".join([row["name"], *times, gain, error, memory, row["note"]]) + " |")
    return lines


def gate_table(results: list[Row]) -> list[str]:
    lines = _table_head(["gate", "threads", "must", "measured", ""])
    for result in results:
        for count, cell in result["threads"].items():
            must = f"{'<=' if result['at_most'] else '>='} {cell['must']:g}"
            measured = f"{cell['value']:.3g}" if "value" in cell else ""
            lines.append(f"| {result['name']} | {count} | {must} | {measured} | {cell['verdict']} |")
    return lines


def _table_head(titles: list[str]) -> list[str]:
    return ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]


def write(result: dict[str, Any], text: str, folder: str) -> list[Path]:
    """The report as <date>-<chip>.md and .json."""
    chip = re.sub(r"[^A-Za-z0-9]+", "-", result["chip"]).strip("-").lower()
    stem = Path(folder) / f"{result['date']}-{chip}{'-quick' if result['quick'] else ''}"
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(".md"), stem.with_suffix(".json")]
    paths[0].write_text(text)
    paths[1].write_text(json.dumps(result, indent=1) + "\n")
    return paths


def fill(path: str, result: dict[str, Any]) -> None:
    """Replaces what stands between `<!-- bench NAME: begin -->` and `<!-- bench NAME: end -->`.

    NAME is a group that was run, or "gates FAMILY" for the gates of all groups of a family if all were.

    Raises:
        ValueError: the file has no such marker.
    """
    sections = {group["name"]: table(group, result) for group in result["groups"]}
    for family in result["complete"]:
        groups = [group for group in result["groups"] if group["family"] == family]
        sections[f"gates {family}"] = gate_table([gate for group in groups for gate in group["gates"]])
    text = Path(path).read_text()
    for name, lines in sections.items():
        begin, end = f"<!-- bench {name}: begin -->\n", f"<!-- bench {name}: end -->"
        if begin in text:
            before, rest = text.split(begin)
            section = "\n".join([_machine(result), "", *lines, end])
            text = before + begin + section + rest.split(end)[1]
    if "<!-- bench " not in text:
        raise ValueError(f"--readme: {path} has no <!-- bench NAME: begin --> marker")
    Path(path).write_text(text)
