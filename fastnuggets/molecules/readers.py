"""Read molecules from files, one record at a time. A broken record is an item with a reason, never an exception."""

from __future__ import annotations

import contextlib
import csv
import errno
import gzip
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fastnuggets.molecules._worker import in_one_line
from fastnuggets.molecules.batch import Molecules
from fastnuggets.molecules.files import need
from fastnuggets.molecules.table import iter_table, open_parquet

_SMILES_COLUMNS = ("smiles", "canonical_smiles", "isomeric_smiles", "smi", "structure")
_NAME_COLUMNS = ("name", "id", "title", "compound", "compound_id", "mol_id", "molecule")
_WATER = {"HOH", "WAT", "DOD", "H2O"}


class Record(NamedTuple):
    """One molecule of a file, or what was wrong with it."""

    index: int  # type: ignore[assignment]  # position in the file, from 1
    name: str  # never empty
    smiles: str  # canonical; empty if broken
    mol: Any  # rdkit.Chem.Mol, with a 3-D conformer if the file has coordinates; None if broken
    error: str | None


class _BrokenError(Exception):
    """A record that cannot be read; its message is the reason."""


class _Format(NamedTuple):
    records: Callable[..., Iterator[tuple[str, Any]]]  # (lines or path, damage list, columns) -> name, payload
    parse: Callable[[Any], Any]  # payload -> Mol


def read(
    path: str | os.PathLike[str], *, column: str | None = None, name_column: str | None = None, start: int = 0
) -> Iterator[Record]:
    """Stream the molecules of a file through RDKit.

    Formats, by ending: ``.sdf`` ``.sd`` ``.mol`` (hydrogens and coordinates kept), ``.smi`` ``.smiles`` (SMILES,
    blank, name), ``.csv`` ``.tsv``; ``.pdb`` ``.ent`` (each HETATM group of two atoms or more that is neither water
    nor part of a SEQRES chain; bond orders are not in the file, so its SMILES has single bonds only); all of them also
    with ``.gz``; ``.parquet`` (a SMILES column, or the table of ``save_table``). The SMILES column of a table is the
    one called smiles, or like it, or ``column``; names come from ``name_column``, or a column called name or id, or
    count the rows. ``start`` skips that many records unparsed.

    A record RDKit cannot read has ``error`` set; so has the tail of a file that was cut off, and reading goes on or
    ends there. RDKit's own messages are kept off the terminal. Raises FileNotFoundError; ValueError for an unknown
    ending or a missing column; ImportError if RDKit is missing.
    """
    path = Path(path)
    need("rdkit.Chem")
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    form = _format(path)
    damage: list[str] = []
    source = path if form.records is _parquet else _lines(path, damage)
    return _read(form, form.records(source, damage, (column, name_column)), damage, start)


def _read(form: _Format, records: Iterator[tuple[str, Any]], damage: list[str], start: int) -> Iterator[Record]:
    chem = need("rdkit.Chem")
    index = start
    for index, (name, payload) in enumerate(islice(records, start, None), start=start + 1):
        name = name or f"record {index}"
        messages: list[str] = []
        try:
            if isinstance(payload, _BrokenError):
                raise payload
            with _rdkit_messages(messages):
                mol = form.parse(payload)
            if mol is None:
                raise _BrokenError(_reason(messages))
            if mol.GetNumAtoms() == 0:
                raise _BrokenError("no atoms")
            smiles = payload.smiles[0] if isinstance(payload, Molecules) else ""
            with _rdkit_messages(messages):
                smiles = smiles or chem.MolToSmiles(chem.RemoveHs(mol, sanitize=False))
        except (_BrokenError, ValueError, RuntimeError) as error:
            yield Record(index, name, "", None, in_one_line(error))
        else:
            yield Record(index, name, smiles, mol, None)
    if damage:
        yield Record(index + 1, f"record {index + 1}", "", None, damage[0])


def read_smiles(path: str | os.PathLike[str], *, column: str | None = None) -> Iterator[str]:
    """The SMILES of a file, one for each record of ``read``; empty for a record that has none.

    Those of a list or table are as they stand there, parsed by nobody: some may be broken. Raises as ``read`` does.
    """
    return (text.smiles for text in read_texts(path, column=column))


class Text(NamedTuple):
    """The SMILES of a record, which may be broken."""

    name: str
    smiles: str
    error: str | None


def read_texts(
    path: str | os.PathLike[str], *, column: str | None = None, name_column: str | None = None, start: int = 0
) -> Iterator[Text]:
    """The records of ``read`` as names and SMILES: those of a list or table as they stand there, parsed by nobody.

    Raises as ``read`` does.
    """
    path = Path(path)
    records = read(path, column=column, name_column=name_column, start=start)
    form = _format(path)
    if form.parse in (_parse_sdf, _parse_pdb):
        return (Text(record.name, record.smiles, record.error) for record in records)
    damage: list[str] = []
    source = path if form.records is _parquet else _lines(path, damage)
    return _named_texts(form.records(source, damage, (column, name_column)), damage, start)


def _named_texts(records: Iterator[tuple[str, Any]], damage: list[str], start: int) -> Iterator[Text]:
    index = start
    for index, (name, payload) in enumerate(islice(records, start, None), start=start + 1):
        name = name or f"record {index}"
        if isinstance(payload, _BrokenError):
            yield Text(name, "", in_one_line(payload))
        elif isinstance(payload, str):
            yield Text(name, payload.strip(), None)
        else:
            chem = need("rdkit.Chem")
            yield Text(
                name, payload.smiles[0] or chem.MolToSmiles(chem.RemoveHs(_parse_row(payload), sanitize=False)), None
            )
    if damage:
        yield Text(f"record {index + 1}", "", damage[0])


def count_records(path: str | os.PathLike[str]) -> int:
    """How many records ``read`` gives at most; reads the file through once, without RDKit."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    form = _format(path)
    damage: list[str] = []
    if form.records is _parquet:
        with open_parquet(path) as file:
            return int(file.metadata.num_rows)
    lines = _lines(path, damage)
    if form.records is _sdf:
        count, tail = 0, False
        for line in lines:
            end = line.startswith(b"$$$$")
            count, tail = count + end, not end and (tail or not line.isspace())
        return count + (tail or bool(damage))
    if form.records is _pdb:
        return sum(1 for _ in _pdb(lines, damage, (None, None)))
    return sum(1 for line in lines if not line.isspace()) + len(damage)


def why_not(molecule: Any) -> str:
    """Why RDKit cannot work with a SMILES or a molecule."""
    messages: list[str] = []
    try:
        with _rdkit_messages(messages):
            mol = _parse_smiles(molecule) if isinstance(molecule, str) else need("rdkit.Chem").RemoveHs(molecule)
        return "no atoms" if mol is not None and mol.GetNumAtoms() == 0 else _reason(messages)
    except (_BrokenError, ValueError, RuntimeError) as error:
        return in_one_line(error)


def _format(path: Path) -> _Format:
    name = path.name.lower().removesuffix(".gz")
    ending = name[name.rfind(".") :] if "." in name else ""
    formats = {
        **dict.fromkeys((".sdf", ".sd", ".mol"), _Format(_sdf, _parse_sdf)),
        **dict.fromkeys((".smi", ".smiles"), _Format(_smi, _parse_smiles)),
        **dict.fromkeys((".csv", ".tsv"), _Format(_csv, _parse_smiles)),
        **dict.fromkeys((".pdb", ".ent"), _Format(_pdb, _parse_pdb)),
        ".parquet": _Format(_parquet, _parse_row),
    }
    if ending not in formats:
        raise ValueError(f"{path}: expected a file ending in {' '.join(formats)}, got {ending or 'no ending'}")
    return formats[ending]


def _lines(path: Path, damage: list[str]) -> Iterator[bytes]:
    """Lines of a file; a broken compressed stream ends them and says so in ``damage``."""
    with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else open(path, "rb") as file:
        try:
            yield from file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            damage.append(f"the compressed file is damaged from here on: {error}")


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")


@contextlib.contextmanager
def _rdkit_messages(messages: list[str]) -> Iterator[None]:
    """Keep RDKit's log off the terminal; its errors go into ``messages`` where this RDKit can hand them over."""
    base = need("rdkit.rdBase")
    with base.BlockLogs():
        if not hasattr(base, "CaptureErrorLog"):
            yield
            return
        with base.CaptureErrorLog() as log:
            try:
                yield
            finally:
                messages.extend(log.messages.splitlines())


def _reason(messages: list[str]) -> str:
    """The line of RDKit's log that says what is wrong: the one marked so, or else the first with a word in it."""
    lines = [re.sub(r"^\[[\d:]+\]\s*|SMILES Parse Error:\s*", "", message).strip() for message in messages]
    marked = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return next((line for line in marked + lines if re.search(r"\w", line)), "RDKit cannot read it")


def _sdf(lines: Iterable[bytes], damage: list[str], columns: Any) -> Iterator[tuple[str, str]]:
    block: list[str] = []
    for line in lines:
        if line.startswith(b"$$$$"):
            yield block[0].strip() if block else "", "".join(block)
            block = []
        else:
            block.append(_text(line).replace("\r\n", "\n"))
    if any(line.strip() for line in block) and not damage:
        yield block[0].strip(), "".join(block)


def _parse_sdf(block: str) -> Any:
    if "M  END" not in block:
        raise _BrokenError("the record is cut off: it has no 'M  END' line")
    supplier = need("rdkit.Chem").SDMolSupplier()
    supplier.SetData(block, removeHs=False)
    return next(supplier, None)


def _smi(lines: Iterable[bytes], damage: list[str], columns: Any) -> Iterator[tuple[str, str]]:
    first = True
    for line in lines:
        fields = _text(line).split(None, 1)
        if fields and not (first and fields[0].lower() in _SMILES_COLUMNS):
            yield fields[1].strip() if len(fields) > 1 else "", fields[0]
        first = first and not fields


def _parse_smiles(smiles: str) -> Any:
    if not smiles.strip():
        raise _BrokenError("no SMILES")
    return need("rdkit.Chem").MolFromSmiles(smiles.strip())


def _csv(lines: Iterable[bytes], damage: list[str], columns: Any) -> Iterator[tuple[str, Any]]:
    stream = (_text(line).replace("\0", "") for line in lines)
    header = next((line for line in stream if line.strip()), "").lstrip("\ufeff")
    if not header:
        return
    delimiter = max(",;\t", key=header.count)
    fields = [field.strip() for field in next(csv.reader([header], delimiter=delimiter))]
    smiles, name = _columns(fields, *columns)
    rows = csv.reader(stream, delimiter=delimiter)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield "", _BrokenError(str(error))
            continue
        if row:
            row += [""] * (len(fields) - len(row))
            yield "" if name is None else row[name].strip(), row[smiles]


def _columns(fields: list[str], column: str | None, name_column: str | None) -> tuple[int, int | None]:
    """Places of the SMILES column and of the name column, which need not be there."""

    def place(wanted: str | None, usual: tuple[str, ...], argument: str) -> int | None:
        if wanted is not None:
            if wanted not in fields:
                raise ValueError(f"{argument}: no column is called {wanted!r}; there are {', '.join(fields)}")
            return fields.index(wanted)
        lower = [field.lower() for field in fields]
        return next((lower.index(field) for field in usual if field in lower), None)

    smiles = place(column, _SMILES_COLUMNS, "column")
    if smiles is None:
        raise ValueError(f"column: no column is called smiles; name one of {', '.join(fields)}")
    return smiles, place(name_column, _NAME_COLUMNS, "name_column")


def _pdb(lines: Iterable[bytes], damage: list[str], columns: Any) -> Iterator[tuple[str, str]]:
    groups: dict[tuple[str, str, str], dict[str, str]] = {}
    bonds: list[str] = []
    polymer = set(_WATER)
    for line in map(_text, lines):
        if line.startswith("SEQRES"):
            polymer.update(line[19:].split())
        elif line.startswith("HETATM") and line[17:20].strip() not in polymer:
            group = groups.setdefault((line[17:20].strip(), line[21:22].strip(), line[22:27].strip()), {})
            group.setdefault(line[12:16], line[:16] + " " + line[17:])  # of alternate locations the first
        elif line.startswith("CONECT"):
            bonds.append(line)
        elif line.startswith("ENDMDL"):  # the other models are the same molecules again
            break
    for key, group in groups.items():
        if len(group) > 1:
            atoms = list(group.values())
            serials = {atom[6:11] for atom in atoms}
            own = [bond for bond in bonds if bond[6:11] in serials]
            yield " ".join(filter(None, key)), "".join([*atoms, *own, "END\n"])


def _parse_pdb(block: str) -> Any:
    return need("rdkit.Chem").MolFromPDBBlock(block, removeHs=False)


def _parquet(path: Path, damage: list[str], columns: Any) -> Iterator[tuple[str, Any]]:
    with open_parquet(path) as file:
        fields = file.schema_arrow.names
        if {"z", "xyz"} <= set(fields) and columns[0] is None:
            for batch in iter_table(path, 1024):
                for i in range(len(batch)):
                    yield batch.names[i], batch[i]
            return
        smiles, name = _columns(fields, *columns)
        wanted = [fields[smiles]] + ([] if name is None else [fields[name]])
        for batch in file.iter_batches(1024, columns=wanted):
            names = [""] * len(batch) if name is None else batch.column(fields[name]).to_pylist()
            for label, text in zip(names, batch.column(fields[smiles]).to_pylist(), strict=True):
                yield "" if label is None else str(label), text or ""


def _parse_row(row: Any) -> Any:
    """A SMILES, or one molecule of the coordinate table: its SMILES with coordinates, or bare atoms if they differ."""
    if isinstance(row, str):
        return _parse_smiles(row)
    chem = need("rdkit.Chem")
    numbers, smiles = row.numbers.tolist(), row.smiles[0]
    mol = chem.MolFromSmiles(smiles) if smiles else None
    if mol is not None and mol.GetNumAtoms() != len(numbers):
        mol = chem.AddHs(mol)
    if mol is None or [atom.GetAtomicNum() for atom in mol.GetAtoms()] != numbers:
        mol = chem.RWMol()
        for number in numbers:
            atom = chem.Atom(number)
            atom.SetNoImplicit(True)
            mol.AddAtom(atom)
        mol = mol.GetMol()
        mol.UpdatePropertyCache(strict=False)
    conformer = chem.Conformer(len(numbers))
    conformer.Set3D(True)
    conformer.SetPositions(row.coords.double().numpy())
    mol.AddConformer(conformer, assignId=True)
    return mol
