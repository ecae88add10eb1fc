"""Tables with gaps, CSV and Parquet: what can be imputed, as numbers for a network, and back without touching the rest.

A CSV file is kept as the text of its cells, quotes and line ends included, and a Parquet file as its Arrow columns, so
that what was there is written back as it was: the types that a table library would guess do not matter. That is why
pandas is not used: it parses, and what it writes is its own spelling of the values.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastnuggets.models.vaeac import MOST_CATEGORIES
from fastnuggets.molecules.files import atomic_write, need

MISSING = ("", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "-NaN", "-nan", "NULL", "Null", "null", "None", "?")
MOST_INFERRED = 100  # categories of a column of text that nobody has called categorical
_DELIMITERS = ",;\t|"
_NO_NUMBER = re.compile(r"\s*[+-]?0\d|.*_")  # Python would take 1_000 for one
_NUMBER, _CATEGORICAL = "number", "categorical"


class Column(NamedTuple):
    """What a network is told of a column. Of plain values: it is saved with the weights."""

    name: str
    kind: str  # "number" or "categorical"
    categories: Sequence[str] = ()  # in order
    mean: float = 0.0
    std: float = 1.0
    decimals: int | None = None  # of numbers in a text; None where they have exponents
    whole: bool = False
    least: float = 0.0
    most: float = 0.0


class Table:
    """The cells of a file as text; "" where nothing is there."""

    names: list[str]
    texts: dict[str, list[str]]  # of each column, "" where missing
    left_out: dict[str, str]  # columns of types that are neither numbers nor categories
    texted: set[str]  # columns that the file itself says are text

    def write(self, path: Path, filled: Mapping[str, Mapping[int, str]]) -> None:
        """The file again, with cells (column -> row -> text) in place of gaps."""
        raise NotImplementedError

    def gaps(self, name: str) -> int:
        """Of a column."""
        return self.texts[name].count("")


def read_table(path: Path, missing: Sequence[str] = MISSING) -> Table:
    """A .csv, .tsv, .txt (in UTF-8, a header first) or .parquet file. ValueError that says what is wrong with it.

    Args:
        missing: texts that stand for a gap; an empty cell always is one.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "no such file", str(path))
    if path.suffix.lower() in (".csv", ".tsv", ".txt"):
        return _Csv(path, {"", *missing})
    if path.suffix.lower() in (".parquet", ".pq"):
        return _Parquet(path)
    raise ValueError(f"{path}: expected a table, .csv, .tsv, .txt or .parquet")


class _Csv(Table):
    def __init__(self, path: Path, missing: set[str]) -> None:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not text in UTF-8 (byte {error.start})") from None
        self.rows = list(_rows(text))  # each of raw cells and what follows them, in turns
        # A blank line is no row, but is written again; of a table of one column it is a gap.
        width = len(self.rows[0]) if self.rows else 0
        self.places = [i for i, row in enumerate(self.rows) if i and (len(row) > 2 or row[0] or width == 2)]
        if not self.rows or not self.places:
            raise ValueError(f"{path}: expected a line of names and at least one row")
        self.names = [_plain(cell.removeprefix("\ufeff")) for cell in self.rows[0][::2]]
        _check_names(self.names, path)
        for i in self.places:
            if len(self.rows[i]) != width:
                raise ValueError(
                    f"{path}: row {i + 1} has {len(self.rows[i]) // 2} cells, the first line {len(self.names)}"
                )
        cells = zip(*(self.rows[i][::2] for i in self.places), strict=True)
        self.texts = {
            name: ["" if text.strip() in missing else text for text in map(_plain, column)]
            for name, column in zip(self.names, cells, strict=True)
        }
        self.left_out, self.texted = {}, set()
        self.delimiter = self.rows[0][1] if width > 2 else ","

    def write(self, path: Path, filled: Mapping[str, Mapping[int, str]]) -> None:
        changed = {
            (self.places[row], 2 * self.names.index(name)): _quoted(text, self.delimiter)
            for name, cells in filled.items()
            for row, text in cells.items()
        }
        with atomic_write(path) as file:
            for i, row in enumerate(self.rows):
                parts = [changed.get((i, j), part) for j, part in enumerate(row)]
                file.write("".join(parts).encode("utf-8"))


def _rows(text: str) -> Iterator[list[str]]:
    """Lists of cell, delimiter, cell, ..., line end; a cell is as it is written."""
    delimiter = max(_DELIMITERS, key=re.sub(r'"[^"]*"', "", text.partition("\n")[0]).count)
    sign, blank = re.escape(delimiter), r"[^\S\r\n]*"
    # The second form takes anything: what only looks quoted is a cell as it stands.
    cell = re.compile(rf'({blank}"[^"]*(?:""[^"]*)*"{blank}|[^\r\n{sign}]*)({sign}|\r\n|\n|\r|\Z)')
    row: list[str] = []
    place = 0
    while place < len(text):
        found = cell.match(text, place)
        assert found is not None
        row += found.groups()
        place = found.end()
        if found[2] != delimiter:
            yield row
            row = []
    if row:  # the file ends with a delimiter: one more cell, of nothing
        yield [*row, "", ""]


def _plain(cell: str) -> str:
    """What a cell says: blanks around it are part of it, as they are for other readers."""
    inner = cell.strip()
    return inner[1:-1].replace('""', '"') if len(inner) > 1 and inner[0] == inner[-1] == '"' else cell


def _quoted(text: str, delimiter: str) -> str:
    if any(sign in text for sign in (delimiter, '"', "\n", "\r")):
        return '"' + text.replace('"', '""') + '"'
    return text


class _Parquet(Table):
    def __init__(self, path: Path) -> None:
        pa, parquet = need("pyarrow", "systems"), need("pyarrow.parquet", "systems")
        try:
            self.table = parquet.read_table(path)
        except pa.ArrowException as error:
            raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
        if not len(self.table):
            raise ValueError(f"{path}: there is no row in it")
        self.names = list(self.table.column_names)
        _check_names(self.names, path)
        self.texts, self.left_out, self.texted = {}, {}, set()
        types = pa.types
        for name, column in zip(self.names, self.table.columns, strict=True):
            kind = column.type.value_type if types.is_dictionary(column.type) else column.type
            if types.is_boolean(kind) or types.is_string(kind) or types.is_large_string(kind):
                self.texted.add(name)
            elif not (types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)):
                self.left_out[name] = f"of type {column.type}"
            if name not in self.left_out:
                self.texts[name] = [_spelled(value) for value in column.to_pylist()]

    def gaps(self, name: str) -> int:
        return super().gaps(name) if name in self.texts else int(self.table.column(name).null_count)

    def write(self, path: Path, filled: Mapping[str, Mapping[int, str]]) -> None:
        pa, parquet = need("pyarrow", "systems"), need("pyarrow.parquet", "systems")
        table = self.table
        for name, cells in filled.items():
            place, field = self.names.index(name), table.schema.field(name)
            values = table.column(place).to_pylist()
            kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
            for row, text in cells.items():
                values[row] = _value(text, kind)
            made = pa.array(values, type=kind)
            table = table.set_column(
                place, field, made.dictionary_encode().cast(field.type) if kind != field.type else made
            )
        with atomic_write(path) as file:
            parquet.write_table(table, file)


def _spelled(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(value)


def _value(text: str, kind: Any) -> Any:
    """Of an Arrow type, from its text."""
    types = need("pyarrow", "systems").types
    if types.is_boolean(kind):
        return text == "True"
    if types.is_integer(kind):
        signed = types.is_signed_integer(kind)
        low, high = (
            (-(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1) - 1) if signed else (0, 2**kind.bit_width - 1)
        )
        return min(max(int(float(text)), low), high)
    if types.is_floating(kind):
        return float(text)
    if types.is_decimal(kind):
        from decimal import Decimal

        return round(Decimal(text), kind.scale)
    return text


def _check_names(names: Sequence[str], path: Path) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: two columns are called {twice[0]!r}")


def infer(
    table: Table, categorical: Sequence[str] = (), numbers: Sequence[str] = ()
) -> tuple[list[Column], dict[str, str]]:
    """The columns that a network can learn from, and why it cannot learn from the others.

    Numbers are numbers, unless there are two, whole ones: those are categories. Text is categories, unless it is
    almost as manifold as there are rows.

    Args:
        categorical, numbers: names of columns that are to be taken so.

    Raises:
        ValueError: there is no such column, it does not hold numbers, or no column is left.
    """
    for name in (*categorical, *numbers):
        if name not in table.names:
            raise ValueError(f"there is no column {name!r}: {', '.join(table.names)}")
    found, left_out = [], dict(table.left_out)
    for name in table.names:
        if name in left_out:
            continue
        told = _CATEGORICAL if name in categorical else _NUMBER if name in numbers else None
        column = _column(name, [text for text in table.texts[name] if text], told, name in table.texted)
        if isinstance(column, str):
            left_out[name] = column
        else:
            found.append(column)
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ValueError(f"no column can be learned from: {reasons}")
    return found, left_out


def _column(name: str, texts: Sequence[str], told: str | None, texted: bool) -> Column | str:
    """Of the texts that are there; or why it is none."""
    distinct = sorted(set(texts))
    if not texts:
        return "empty"
    if len(distinct) == 1:
        return f"constant, {distinct[0]!r} wherever it is not empty"
    values = _numbers(texts)
    if told == _NUMBER and values is None:
        wrong = next(text for text in distinct if _numbers([text]) is None)
        raise ValueError(f"column {name!r}: not a number: {wrong!r}")
    if told == _CATEGORICAL or values is None or (texted and told is None):
        most = MOST_CATEGORIES if told else min(MOST_INFERRED, max(2, len(texts) // 2))
        if len(distinct) > most:
            return f"identifiers or free text: {len(distinct)} different values in {len(texts)} rows"
        return Column(name, _CATEGORICAL, distinct)
    if not np.isfinite(values).all():
        return "holds numbers that are not finite"
    if len(np.unique(values)) == 1:
        return f"constant, {distinct[0]!r} wherever it is not empty"
    whole = bool((values == np.round(values)).all())
    if told is None and whole and len(distinct) == 2:
        return Column(name, _CATEGORICAL, distinct)
    if told is None and whole and len(values) > 2 and (np.diff(values) == 1).all():
        return "numbers of the rows"
    decimals: int | None = None
    if not any(sign in text for text in texts for sign in "eE"):
        decimals = max(len(text.strip().partition(".")[2]) for text in texts)
    mean, std, low, high = (float(of()) for of in (values.mean, values.std, values.min, values.max))
    return Column(name, _NUMBER, (), mean, std, decimals, whole, low, high)


def _numbers(texts: Sequence[str]) -> np.ndarray | None:
    """[len(texts)] float64; None if one is no number: a code such as 0042 is none."""
    if any(_NO_NUMBER.match(text) for text in texts):
        return None
    try:
        return np.array([float(text) for text in texts])
    except ValueError:
        return None


def encode(table: Table, columns: Sequence[Column]) -> Tensor:
    """[rows, columns] float32: numbers standardised, categories as their places, NaN where nothing is.

    ValueError that names the column that is missing, the category that was never seen, or what is no number.
    """
    parts = []
    for column in columns:
        if column.name not in table.texts:
            raise ValueError(f"there is no column {column.name!r}, which was learned from")
        texts = table.texts[column.name]
        parts.append(_places(texts, column) if column.kind == _CATEGORICAL else _standardised(texts, column))
    return torch.tensor(np.stack(parts, 1), dtype=torch.float32)


def _places(texts: Sequence[str], column: Column) -> np.ndarray:
    place = {"": math.nan, **{category: float(i) for i, category in enumerate(column.categories)}}
    for row, text in enumerate(texts):
        if text not in place:
            raise ValueError(
                f"column {column.name!r}, row {row + 1}: the category {text!r} was not there when it was learned"
            )
    return np.array([place[text] for text in texts])


def _standardised(texts: Sequence[str], column: Column) -> np.ndarray:
    values = _numbers([text or "nan" for text in texts])
    if values is None:
        row, wrong = next((i, text) for i, text in enumerate(texts) if text and _numbers([text]) is None)
        raise ValueError(f"column {column.name!r}, row {row + 1}: not a number: {wrong!r}")
    if np.isinf(values).any():
        raise ValueError(f"column {column.name!r}: holds numbers that are not finite")
    return (values - column.mean) / column.std


def spell(column: Column, values: np.ndarray, *, within: bool = False) -> list[str]:
    """Texts of a column's values as `encode` makes them, in the style of those that were there.

    ``within``: numbers are brought into the range of those.
    """
    if column.kind == _CATEGORICAL:
        return [column.categories[int(value)] for value in values]
    numbers = values.astype(np.float64) * column.std + column.mean
    numbers = numbers.clip(column.least, column.most) if within else numbers
    numbers = np.round(numbers) if column.whole else numbers
    if column.decimals is None:
        return [f"{value:.6g}" for value in numbers]
    # Never "-0".
    return [f"{value:.{column.decimals}f}" for value in np.round(numbers, column.decimals) + 0.0]


def sizes(columns: Sequence[Column]) -> list[int]:
    """Categories of each, 0 for numbers."""
    return [len(column.categories) for column in columns]
