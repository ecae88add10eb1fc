"""A training's figures as CSV, one row a step, never ahead of its checkpoint."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path


class CsvLog:
    """Rows of figures; the first column is ``step``.

    Rows wait until `flush`. A file that exists is gone on with: rows of later steps than `step`, which the training
    will do again, are taken out, and so is a row that was cut off.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self._waiting: list[dict[str, float]] = []
        self._columns = ["step"]
        if path.exists():
            rows = list(_rows(path, step))
            self._columns = list(rows[0]) if rows else ["step"]
            self._rewrite(rows)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        self._waiting.append({"step": step, **figures})

    def flush(self) -> None:
        """Rows that waited are in the file, and on the disk."""
        if not self._waiting:
            return
        more = [name for row in self._waiting for name in row if name not in self._columns]
        if more or not self.path.exists():
            rows = list(_rows(self.path, None)) if self.path.exists() else []
            self._columns += dict.fromkeys(more)
            self._rewrite(rows)
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerows(self._waiting)
            file.flush()
            os.fsync(file.fileno())
        self._waiting.clear()

    def _rewrite(self, rows: Iterable[Mapping[str, object]]) -> None:
        partial = self.path.with_name(f".{self.path.name}.partial")
        with open(partial, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(partial, self.path)


def read_log(path: Path) -> dict[str, list[float]]:
    """Columns of a log; NaN where a step has no such figure."""
    rows = list(_rows(path, None))
    names = rows[0] if rows else ()
    return {name: [float(row[name] or "nan") for row in rows] for name in names}


def _rows(path: Path, last: int | None) -> Iterable[dict[str, str]]:
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            step = row.get("step") or ""
            if None in row.values() or not step.isdigit() or (last is not None and int(step) > last):
                return
            yield row
