"""Soups: averages of checkpoint files, streamed in constant memory, and the greedy choice of what goes into one.

Checkpoints are safetensors files, ``.pt`` files, or sharded models of either. Files are read through a memory map and
in slices, so that neither a model nor a single tensor has to fit into memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import mmap
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import fastnuggets
from fastnuggets import ops

Checkpoints: TypeAlias = "Sequence[str | os.PathLike[str] | Mapping[str, Tensor]]"

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Averaging these means taking them from one of the files.
_INTEGERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPES = {**FLOATS, **_INTEGERS}
_CODES = {dtype: name for name, dtype in _DTYPES.items()}
_NESTED = ("state_dict", "model_state_dict", "model")
_CHUNK = 1 << 25  # bytes of all sources and of the output that are in memory at once
_REOPEN = 1 << 27  # bytes of all .pt files that are read before their maps are dropped
_SHOWN = 20  # differences in a message
_ALIGN = 8  # of the data in a safetensors file


class Soup(NamedTuple):
    """What :func:`average_checkpoints` did."""

    files: list[Path]  # written, the index last
    tensors: int
    integers: int  # tensors that were taken from the last checkpoint
    left_out: int  # entries of .pt files that are no tensors
    nonfinite: list[str]  # names of the tensors that hold a NaN or an inf


class GreedySoup(NamedTuple):
    """What :func:`greedy_soup` found."""

    weights: dict[str, Tensor]  # the mean of the members
    members: list[int]  # their positions among the checkpoints, the best one first
    score: float
    scores: list[float]  # of each checkpoint alone


def average_checkpoints(
    checkpoints: Checkpoints,
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    allow_nonfinite: bool = False,
    overwrite: bool = False,
    chunk_bytes: int = _CHUNK,
    progress: bool = False,
) -> Soup:
    """Write the weighted sum of checkpoints, tensor by tensor, as safetensors.

    Sums are float32 (float64 for float64 tensors) in the order of the checkpoints, and rounded once. Integer and
    boolean tensors are those of the last checkpoint. Memory is bounded by ``chunk_bytes``, and by 128 MiB in all for
    .pt files, however large the models and their tensors are. But a .pt file from before torch 1.6 is loaded whole, and
    Linux lets torch map one that is larger than the machine's memory only if vm.overcommit_memory is 1.

    Args:
        checkpoints: K of: a .safetensors file; a .pt, .pth or .bin file with a dictionary of tensors, at the top or
            under ``state_dict``, ``model_state_dict`` or ``model`` (read with ``weights_only``: no code of it runs);
            ``*.index.json`` of a sharded model; the folder of one of these; or a dictionary of tensors.
        out: name.safetensors, or a folder, which gets model.safetensors.
        weights: K coefficients, used as given; a warning says so if their sum is not 1. Default: 1 / K each.
        ema: decay in [0, 1]; instead of ``weights``: ``a <- decay a + (1 - decay) w`` over the checkpoints in their
            order, from the first one.
        dtype: of the floating-point tensors of the output; default: as in the checkpoints.
        max_shard_size: bytes of tensors in a file. A larger model becomes name-00001-of-0000N.safetensors and
            name.safetensors.index.json; the index is written last.
        allow_nonfinite: write NaN and inf instead of refusing them.
        overwrite: replace an output that exists.
        progress: a bar on stderr, if that is a terminal. Needs tqdm.

    Raises:
        ValueError: the checkpoints have other names, shapes or dtypes (with a table); a file is none; a tensor holds a
            NaN or an inf; a dtype that cannot be averaged. FileExistsError. ImportError: without safetensors.
        RuntimeError: a file was changed while it was read. MemoryError: torch cannot map a .pt file.

    Files are written beside their final name, synced and renamed: after an interruption there is no half-written file
    under that name. The same checkpoints and arguments give the same bytes, for any number of threads and chunks.

    M. Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482.
    """
    safetensors = _safetensors()
    coefficients = _coefficients(len(checkpoints), weights, ema)
    if dtype is not None and dtype not in FLOATS.values():
        raise ValueError(f"dtype must be one of {', '.join(map(_kind, FLOATS.values()))}, got {_kind(dtype)}")
    sources = _open(checkpoints)
    target = _target(Path(out))
    before = _files(target)
    # Shards without an index are what an interruption left.
    complete = [path for path in before if path in (target, _index(target))]
    if complete and not overwrite:
        raise FileExistsError(errno.EEXIST, "the output exists already", str(complete[0]))
    items = _layout(sources[0], dtype)
    size = sum(item.bytes for item in items)
    shards = _shards(items, max_shard_size or size)
    paths = [target]
    if len(shards) > 1:
        paths = [
            target.with_name(f"{target.stem}-{i:05}-of-{len(shards):05}.safetensors") for i in range(1, len(shards) + 1)
        ]
    metadata = {
        "format": "pt",
        "fastnuggets": fastnuggets.__version__,
        "average": json.dumps([[source.name, c] for source, c in zip(sources, coefficients, strict=True)]),
    }
    work = _Work(sources, coefficients, max(8, chunk_bytes // (len(sources) + 1)), allow_nonfinite, [])
    _clear(target)
    try:
        if shutil.disk_usage(target.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target.parent))
        with _bar(size, progress) as bar:
            for path, shard in zip(paths, shards, strict=True):
                _write(_partial(path), shard, metadata, work, bar)
                # Its reader checks the header that we wrote.
                with safetensors.safe_open(_partial(path), framework="pt"):
                    pass
        for source in sources:
            source.check_unchanged()
        if len(shards) > 1:
            paths.append(_write_index(target, paths, shards, metadata))
            # Whenever it is interrupted: shards without an index are seen to be incomplete, a wrong index is not.
            paths[-1].unlink(missing_ok=True)
        for path in paths:
            os.replace(_partial(path), path)
        for path in before:
            if path not in paths:
                path.unlink(missing_ok=True)
    except BaseException:
        _clear(target)
        raise
    integers = sum(item.dtype not in FLOATS.values() for item in items)
    return Soup(paths, len(items), integers, sum(source.left_out for source in sources), work.nonfinite)


def greedy_soup(
    checkpoints: Checkpoints,
    score: Callable[[dict[str, Tensor]], float],
    *,
    scores: Sequence[float] | None = None,
    state: str | os.PathLike[str] | None = None,
) -> GreedySoup:
    """Add checkpoints to a mean one by one, the best first, and keep each that does not lower the score.

    Scores at most 2 K - 1 models. Memory: a float32 sum and one model.

    Args:
        checkpoints: K, as for :func:`average_checkpoints`.
        score: called with a dictionary of tensors; higher is better, NaN is the worst. The tensors are overwritten
            between calls: copy them (``load_state_dict`` does), do not keep them.
        scores: K known scores of the checkpoints alone, on the same data; default: they are computed.
        state: a JSON file in which each score is kept as soon as it is known. After an interruption the same call goes
            on from there and finds the same bits.

    Raises:
        ValueError: as :func:`average_checkpoints`; ``state`` is of other checkpoints; or every score is NaN.

    M. Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482, recipe 1.
    """
    sources = _open(checkpoints)
    log = _Log(None if state is None else Path(state), sources)
    items = _layout(sources[0], None)
    mixed = {item.name: torch.empty(item.shape, dtype=item.dtype) for item in items}
    total = {item.name: torch.empty(item.shape, dtype=_accumulator(item.dtype)) for item in items}
    sum_so_far = _entries(total)

    def scored(key: str, *parts: tuple[Mapping[str, _Entry], float]) -> float:
        if key not in log.known:
            _mix(items, mixed, parts, sources)
            log.add(key, float(score(mixed)))
        return log.known[key]

    if scores is None:
        scores = [scored(f"{i}", (source.entries, 1.0)) for i, source in enumerate(sources)]
    if len(scores) != len(sources):
        raise ValueError(f"scores must be {len(sources)} numbers, one for each checkpoint, got {len(scores)}")
    order = sorted(range(len(sources)), key=lambda i: -_rank(scores[i]))
    if math.isnan(scores[order[0]]):
        raise ValueError("the score of every checkpoint is NaN")
    members, best = order[:1], scores[order[0]]
    _mix(items, total, [(sources[order[0]].entries, 1.0)], sources)
    for index in order[1:]:
        share = 1 / (len(members) + 1)
        found = scored(f"{members} + {index}", (sum_so_far, share), (sources[index].entries, share))
        if _rank(found) >= best:
            members.append(index)
            best = found
            _mix(items, total, [(sum_so_far, 1.0), (sources[index].entries, 1.0)], sources)
    _mix(items, mixed, [(sum_so_far, 1 / len(members))], sources)
    return GreedySoup(mixed, members, best, list(scores))


class _Entry(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    data: Tensor  # of this dtype and shape; or its bytes as uint8, if they lie where no tensor of the dtype may begin

    def read(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` in the order of the indices: a view if that is possible."""
        if self.data.dtype != self.dtype:
            size = self.dtype.itemsize
            return self.data[start * size : stop * size].clone().view(self.dtype)
        if self.data.is_contiguous():
            return self.data.view(-1)[start:stop]
        row = self.data[0].numel()
        first = start // row
        return self.data[first : -(-stop // row)].reshape(-1)[start - first * row : stop - first * row]


class _Item(NamedTuple):
    """A tensor of the output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


_Piece: TypeAlias = tuple[_Item, int, int]  # elements from, to


class _Source:
    """A checkpoint: its tensors by name, views of mapped files."""

    def __init__(self, name: str, reopen: int) -> None:
        self.name = name
        self.entries: dict[str, _Entry] = {}
        self.left_out = 0
        self._maps: list[mmap.mmap] = []
        self._pickles: dict[Path, list[str]] = {}
        self._identity: dict[Path, list[int]] = {}
        self._reopen, self._read = reopen, 0

    def add(self, path: Path, names: Collection[str] | None = None) -> None:
        """Take the tensors of a file: all, or those called so."""
        self._identity[path] = _identity(path)
        found = self._safetensors(path) if path.suffix == ".safetensors" else self._pickle(path)
        if names is None:
            names = found.keys()
        for name in names:
            if name not in found:
                raise ValueError(f"{path}: {name} is not here, where the index of {self.name} says it is")
            dtype = found[name].dtype
            if dtype not in _CODES:
                raise ValueError(f"{path}: {name} is {_kind(dtype)} and cannot be averaged")
            self.entries[name] = found[name]

    def _safetensors(self, path: Path) -> dict[str, _Entry]:
        safetensors = _safetensors()
        try:
            # Its reader checks sizes and offsets.
            with safetensors.safe_open(path, framework="pt"), open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error})") from error
        self._maps.append(mapped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch says that the memory is read-only
            data = torch.frombuffer(mapped, dtype=torch.uint8)
        header.pop("__metadata__", None)
        return {name: _mapped(path, name, field, data, 8 + length) for name, field in header.items()}

    def _pickle(self, path: Path) -> dict[str, _Entry]:
        tensors, others, mapped = _load(path)
        self.left_out += others
        if mapped:
            self._pickles[path] = list(tensors)
        return _entries(tensors)

    def release(self, size: int) -> None:
        """Give back the pages that ``size`` bytes were read from: they count as memory of this process."""
        for mapped in self._maps:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)
        self._read += size
        if self._read > self._reopen:
            self._read = 0
            self.check_unchanged()
            for path, names in self._pickles.items():
                # torch keeps its map to itself, and drops it with the last tensor.
                tensors = _load(path)[0]
                self.entries.update({n: e for n, e in _entries(tensors).items() if n in names and n in self.entries})

    def check_unchanged(self) -> None:
        for path, identity in self._identity.items():
            if _identity(path) != identity:
                raise RuntimeError(f"{path} was changed while it was read")

    def stamp(self) -> list[Any]:
        """What tells this checkpoint from a later one of the same name."""
        return [self.name, *(identity[1:] for identity in self._identity.values())]


class _Work(NamedTuple):
    sources: list[_Source]
    coefficients: list[float]
    room: int  # bytes of a piece of the output
    allow_nonfinite: bool
    nonfinite: list[str]  # names found so far

    def fill(self, pieces: Sequence[_Piece], outs: Sequence[Tensor]) -> None:
        _sum(pieces, outs, [source.entries for source in self.sources], self.coefficients)
        floats = [(piece, out) for piece, out in zip(pieces, outs, strict=True) if out.is_floating_point()]
        if floats and ops.first_nonfinite([out for _, out in floats]) >= 0:
            self._tell(floats)
        _release(self.sources, pieces)

    def _tell(self, floats: Sequence[tuple[_Piece, Tensor]]) -> None:
        for (item, start, stop), out in floats:
            if ops.first_nonfinite([out]) < 0 or item.name in self.nonfinite:
                continue
            self.nonfinite.append(item.name)
            if self.allow_nonfinite:
                continue
            bad = [s.name for s in self.sources if ops.first_nonfinite([s.entries[item.name].read(start, stop)]) >= 0]
            if not bad:
                raise ValueError(f"{item.name}: the average is beyond the range of {_kind(item.dtype)}")
            raise ValueError(f"{item.name} holds a NaN or an inf in {', '.join(bad)}")


class _Log:
    """The scores known so far, in a JSON file if there is one."""

    def __init__(self, path: Path | None, sources: Sequence[_Source]) -> None:
        self.path = path
        self.stamps = [source.stamp() for source in sources]
        self.known: dict[str, float] = {}
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text())
                stamps, self.known = found["checkpoints"], dict(found["scores"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: not a state of greedy_soup ({error})") from error
            if stamps != self.stamps:
                raise ValueError(f"{path}: a soup of other checkpoints")

    def add(self, key: str, value: float) -> None:
        self.known[key] = value
        if self.path is not None:
            with open(_partial(self.path), "w") as file:
                json.dump({"checkpoints": self.stamps, "scores": self.known}, file, indent=2)
                file.flush()
                os.fsync(file.fileno())
            os.replace(_partial(self.path), self.path)


def _safetensors() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError("safetensors is not installed: pip install 'fastnuggets[average]'") from error
    return safetensors


def _coefficients(count: int, weights: Sequence[float] | None, ema: float | None) -> list[float]:
    if count == 0:
        raise ValueError("no checkpoint to average")
    if ema is not None:
        if weights is not None:
            raise ValueError("weights and ema exclude each other")
        if not 0 <= ema <= 1:
            raise ValueError(f"ema must be a decay in [0, 1], got {ema}")
        return [ema ** (count - 1), *((1 - ema) * ema ** (count - 1 - k) for k in range(1, count))]
    if weights is None:
        return [1 / count] * count
    weights = [float(weight) for weight in weights]
    if len(weights) != count or not all(map(math.isfinite, weights)):
        raise ValueError(f"weights must be {count} finite numbers, one for each checkpoint, got {weights}")
    if abs(sum(weights) - 1) > 1e-6:
        warnings.warn(f"the weights add up to {sum(weights):.7g}, not to 1, and are used as given", stacklevel=3)
    return weights


def _open(checkpoints: Checkpoints) -> list[_Source]:
    if not checkpoints:
        raise ValueError("no checkpoint to average")
    sources = []
    for number, checkpoint in enumerate(checkpoints):
        named = f"checkpoint {number}" if isinstance(checkpoint, Mapping) else str(checkpoint)
        source = _Source(named, _REOPEN // len(checkpoints))
        if isinstance(checkpoint, Mapping):
            source.entries = _entries({name: tensor.detach().cpu() for name, tensor in checkpoint.items()})
        else:
            _add_path(source, Path(checkpoint))
        if not source.entries:
            raise ValueError(f"{named}: there are no tensors in it")
        sources.append(source)
    _check_same(sources)
    return sources


def _add_path(source: _Source, path: Path) -> None:
    if path.is_dir():
        path = _in_folder(path)
    if not path.name.endswith(".json"):
        return source.add(path)
    try:
        where = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the index of a sharded model ({error})") from error
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise ValueError(f"{path}: expected files beside the index, got {file}")
        source.add(path.with_name(file), [name for name, shard in where.items() if shard == file])
    return None


def _in_folder(folder: Path) -> Path:
    for pattern in ("*.safetensors.index.json", "*.safetensors", "*.bin.index.json", "*.bin", "*.pt", "*.pth"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise ValueError(f"{folder}: name one of {', '.join(path.name for path in found)}")
        if found:
            return found[0]
    raise ValueError(f"{folder}: there is no checkpoint in it")


def _load(path: Path) -> tuple[dict[str, Tensor], int, bool]:
    """Tensors of a .pt file, the number of its other entries, and whether the file is mapped."""
    mapped = zipfile.is_zipfile(path)  # torch cannot map its older format
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        reason = str(error).strip().partition("\n")[0]
        if "unable to mmap" in reason:
            raise MemoryError(
                f"{path}: torch cannot map it; a safetensors file has no such limit ({reason})"
            ) from error
        # Not torch's whole message: it goes on to advise loading it unsafely.
        reason = f"{type(error).__name__}: {reason.partition('. ')[0]}"
        raise ValueError(f"{path}: not a checkpoint that can be read ({reason})") from error
    nested = [content[key] for key in _NESTED if key in content] if isinstance(content, Mapping) else []
    for part in (*nested, content):
        tensors = {str(k): v for k, v in part.items() if isinstance(v, Tensor)} if isinstance(part, Mapping) else {}
        if any(tensor.layout != torch.strided for tensor in tensors.values()):
            raise ValueError(f"{path}: sparse tensors cannot be averaged")
        if tensors:
            return {name: tensor.detach() for name, tensor in tensors.items()}, len(part) - len(tensors), mapped
    return {}, 0, mapped


def _entries(tensors: Mapping[str, Tensor]) -> dict[str, _Entry]:
    return {name: _Entry(tensor.dtype, tuple(tensor.shape), tensor) for name, tensor in tensors.items()}


def _mapped(path: Path, name: str, field: dict[str, Any], data: Tensor, base: int) -> _Entry:
    """The entry of a tensor in a safetensors file, whose bytes are ``data`` and whose tensors begin at ``base``."""
    dtype, shape = _DTYPES.get(field["dtype"]), tuple(field["shape"])
    if dtype is None:
        raise ValueError(f"{path}: {name} is {field['dtype']} and cannot be averaged")
    begin, end = (base + offset for offset in field["data_offsets"])
    raw = data[begin:end]
    # Files of other writers may put tensors anywhere.
    return _Entry(dtype, shape, raw if begin % dtype.itemsize else raw.view(dtype).view(shape))


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_ino, status.st_size, status.st_mtime_ns]


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_same(sources: Sequence[_Source]) -> None:
    """ValueError with a table, if the tensors of a checkpoint are not those of the first one."""

    def said(source: _Source, name: str) -> str:
        entry = source.entries.get(name)
        return "missing" if entry is None else f"{_kind(entry.dtype)} {list(entry.shape)}"

    first, *others = sources
    rows = [
        (name, said(first, name), said(other, name), other.name)
        for other in others
        for name in sorted({*first.entries, *other.entries})
        if said(first, name) != said(other, name)
    ]
    if not rows:
        return
    table = [("tensor", f"in {first.name}", "in the other", "the other"), *rows[:_SHOWN]]
    widths = [max(len(row[column]) for row in table) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN} more")
    count = f"{len(rows)} difference{'s' if len(rows) > 1 else ''}"
    raise ValueError("\n".join(["the checkpoints do not fit together:", *lines, f"{count} from {first.name}"]))


def _target(out: Path) -> Path:
    if out.suffix == ".safetensors":
        return out
    if out.is_dir():
        return out / "model.safetensors"
    raise ValueError(f"expected a name ending in .safetensors, or a folder, got {out}")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _index(target: Path) -> Path:
    return target.with_name(f"{target.name}.index.json")


def _files(target: Path, before: str = "", after: str = "") -> list[Path]:
    """What there is of a model of this name, whole or in shards; the index first."""
    name = re.escape(target.stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    pattern = re.compile(re.escape(before) + name + re.escape(after))
    found = (path for path in target.parent.iterdir() if pattern.fullmatch(path.name))
    return sorted(found, key=lambda path: (".index.json" not in path.name, path.name))


def _clear(target: Path) -> None:
    for path in _files(target, ".", ".partial"):
        path.unlink(missing_ok=True)


def _layout(source: _Source, dtype: torch.dtype | None) -> list[_Item]:
    """The output's tensors: the widest types first, so that each begins where a tensor of its type may."""
    items = [
        _Item(name, dtype or entry.dtype if entry.dtype in FLOATS.values() else entry.dtype, entry.shape)
        for name, entry in source.entries.items()
    ]
    return sorted(items, key=lambda item: (-item.dtype.itemsize, item.name))


def _shards(items: Sequence[_Item], limit: int) -> list[list[_Item]]:
    shards: list[list[_Item]] = [[]]
    used = 0
    for item in items:
        if shards[-1] and used + item.bytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(item)
        used += item.bytes
    return shards


def _pieces(items: Sequence[_Item], room: int) -> Iterator[list[_Piece]]:
    """Groups of pieces of the items, in their order, of ``room`` bytes or less."""
    group: list[_Piece] = []
    used = 0
    for item in items:
        start, size = 0, item.dtype.itemsize
        while start < item.numel:
            if room - used < size:
                yield group
                group, used = [], 0
            stop = min(item.numel, start + (room - used) // size)
            group.append((item, start, stop))
            used += (stop - start) * size
            start = stop
    if group:
        yield group


def _sum(
    pieces: Sequence[_Piece],
    outs: Sequence[Tensor],
    parts: Sequence[Mapping[str, _Entry]],
    coefficients: Sequence[float],
) -> None:
    """Weighted sum of the pieces; those of integers come from the last part."""
    floats = [i for i, out in enumerate(outs) if out.is_floating_point()]
    for i in set(range(len(outs))).difference(floats):
        item, start, stop = pieces[i]
        outs[i].copy_(parts[-1][item.name].read(start, stop))
    if floats:
        read = [
            [part[item.name].read(start, stop) for item, start, stop in map(pieces.__getitem__, floats)]
            for part in parts
        ]
        ops.weighted_sum_([outs[i] for i in floats], read, coefficients)


def _mix(
    items: Sequence[_Item],
    out: Mapping[str, Tensor],
    parts: Sequence[tuple[Mapping[str, _Entry], float]],
    sources: Sequence[_Source],
) -> None:
    for pieces in _pieces(items, _CHUNK):
        outs = [out[item.name].view(-1)[start:stop] for item, start, stop in pieces]
        _sum(pieces, outs, [part for part, _ in parts], [coefficient for _, coefficient in parts])
        _release(sources, pieces)


def _release(sources: Sequence[_Source], pieces: Sequence[_Piece]) -> None:
    size = sum((stop - start) * item.dtype.itemsize for item, start, stop in pieces)
    for source in sources:
        source.release(size)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _rank(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _write(path: Path, items: Sequence[_Item], metadata: dict[str, str], work: _Work, bar: Any) -> None:
    buffer = torch.empty(work.room, dtype=torch.uint8)
    bytes_of: Any = buffer.numpy()
    with open(path, "wb") as file:
        file.write(_header(items, metadata))
        for pieces in _pieces(items, work.room):
            outs, size = [], 0
            for item, start, stop in pieces:
                end = size + (stop - start) * item.dtype.itemsize
                outs.append(buffer[size:end].view(item.dtype))
                size = end
            work.fill(pieces, outs)
            file.write(memoryview(bytes_of[:size]))
            if bar is not None:
                bar.update(size)
        file.flush()
        os.fsync(file.fileno())


def _header(items: Sequence[_Item], metadata: dict[str, str]) -> bytes:
    """Eight bytes of length, little-endian, then JSON, padded with spaces so that the tensors begin aligned."""
    fields: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for item in items:
        fields[item.name] = {
            "dtype": _CODES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.bytes],
        }
        offset += item.bytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_index(
    target: Path, paths: Sequence[Path], shards: Sequence[Sequence[_Item]], metadata: dict[str, str]
) -> Path:
    index = _index(target)
    size = sum(item.bytes for shard in shards for item in shard)
    where = {item.name: path.name for path, shard in zip(paths, shards, strict=True) for item in shard}
    with open(_partial(index), "w") as file:
        json.dump({"metadata": {"total_size": size, **metadata}, "weight_map": where}, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    return index


@contextlib.contextmanager
def _bar(size: int, progress: bool) -> Iterator[Any]:
    if not progress:
        yield None
        return
    from tqdm import tqdm

    with tqdm(total=size, unit="B", unit_scale=True, desc="average", disable=None) as bar:
        yield bar
