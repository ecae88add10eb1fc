"""The nearest rows are those that RDKit finds, with RDKit's similarities, however the search is cut into pieces."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from fastnuggets import build_info, ops, reference
from fastnuggets.cli import main
from fastnuggets.molecules import Fingerprints, screening
from fastnuggets.molecules.fingerprints import fingerprints, pack
from fastnuggets.molecules.screening import tanimoto_topk


def rows(count: int, width: int, seed: int = 0, density: float = 0.3) -> Tensor:
    """Random bits; some rows are empty, some come twice."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.rand(count, width, 8, generator=generator) < density
    bits[5::13] = False
    bits[7::10] = bits[2::10][: len(bits[7::10])]
    return (bits * (1 << torch.arange(8))).sum(2).to(torch.uint8)


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["maccs", "morgan"])
def test_equals_rdkit_on_molecules(kind, threads):
    pytest.importorskip("rdkit")
    from rdkit import DataStructs
    from test_fingerprints import smiles

    found = fingerprints(smiles(400), kind, processes=0)
    vectors = [DataStructs.CreateFromBitString("".join(map(str, row))) for row in found.unpack()]
    bulk = np.array([DataStructs.BulkTanimotoSimilarity(vector, vectors) for vector in vectors[:70]])
    order = np.argsort(-bulk, axis=1, kind="stable")
    for n in (1, 2):
        threads(n)
        for k in (1, 10, len(found)):
            similarity, index = ops.tanimoto_topk(found.tensor()[:70], found.tensor(), k)
            assert np.array_equal(index.numpy(), order[:, :k])
            assert np.array_equal(similarity.numpy(), np.take_along_axis(bulk, order[:, :k], 1))


def test_two_empty_rows_are_as_rdkit_has_them():
    similarity, index = ops.tanimoto_topk(torch.zeros(1, 24, dtype=torch.uint8), rows(20, 24)[:6], 6)
    assert similarity.tolist() == [[0.0] * 6]
    assert index.tolist() == [[0, 1, 2, 3, 4, 5]]
    data = pytest.importorskip("rdkit.DataStructs")
    empty = data.ExplicitBitVect(64)
    assert data.TanimotoSimilarity(empty, empty) == 0.0


@pytest.mark.parametrize("width", [0, 8, 24, 64, 128, 248, 256, 4088])
def test_rows_of_any_width(width):
    """A byte holds the counts of 31 words: full rows would show if it ran over."""
    database = rows(200, width, 1)
    database[3], database[150] = 255, 255
    queries = torch.cat([database[:4], rows(3, width, 2, 0.9)])
    assert_same(ops.tanimoto_topk(queries, database, 12), reference.tanimoto_topk(queries, database, 12, 0.0))


def test_of_equal_rows_the_first():
    database = rows(3, 8).repeat(3000, 1)
    similarity, index = ops.tanimoto_topk(database[:3], database, 7)
    assert (similarity == 1).all()
    assert index.tolist() == [[i + 3 * rank for rank in range(7)] for i in range(3)]


def test_fewer_rows_than_asked_for():
    database = rows(4, 8)
    similarity, index = ops.tanimoto_topk(database[:2], database, 6)
    assert index[:, :4].sort(1).values.tolist() == [[0, 1, 2, 3]] * 2
    assert index[:, 4:].tolist() == [[-1, -1]] * 2
    assert similarity[:, 4:].tolist() == [[0.0, 0.0]] * 2
    assert [t.shape for t in ops.tanimoto_topk(database, database, 0)] == [(4, 0), (4, 0)]


def test_threshold_is_exact():
    """A row that is exactly as similar as asked for counts; one a hair below does not."""
    database = rows(500, 16, 3)
    every = reference.tanimoto(database[:1], database)[0]
    for value in every.sort().values[[100, 250, 499]].tolist():
        for threshold in (value, np.nextafter(value, 0), np.nextafter(value, 2)):
            if threshold <= 1:
                similarity, index = ops.tanimoto_topk(database[:1], database, 500, threshold=threshold)
                assert (index >= 0).sum() == (every >= threshold).sum()
                assert ((similarity >= threshold) == (index >= 0)).all()


def test_fractions_that_differ_by_a_hair():
    """16350/32701 and 16351/32703 are 1/(32701 x 32703) apart: no fractions of so few bits are nearer."""
    query = torch.arange(4088 * 8)[None] < 16352
    sets = [(16350, 16349), (16351, 16351), (16352, 16352)]  # bits in common with the query, and others
    place = torch.arange(4088 * 8)
    database = torch.stack([(place < c) | ((place >= 16352) & (place < 16352 + others)) for c, others in sets])
    similarity, index = ops.tanimoto_topk(pack(query), pack(database), 3)
    assert index.tolist() == [[2, 1, 0]]
    assert similarity.tolist() == [[0.5, 16351 / 32703, 16350 / 32701]]


@pytest.mark.parametrize("level", ["generic", "avx2"])
def test_any_instruction_set_finds_the_same(level, tmp_path):
    if level == build_info()["simd"]:
        pytest.skip("the other tests run with it")
    queries, database = rows(70, 24, 1), rows(3000, 24, 2)
    torch.save((queries, database), tmp_path / "rows.pt")
    script = (
        "import sys, torch; from fastnuggets import ops; q, d = torch.load(sys.argv[1] + '/rows.pt');"
        "torch.save([ops.tanimoto_topk(q[:, :w], d[:, :w], 5) for w in (8, 24)], sys.argv[1] + '/found.pt')"
    )
    environment = {**os.environ, "FASTNUGGETS_SIMD": level}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, env=environment)
    for width, found in zip((8, 24), torch.load(tmp_path / "found.pt"), strict=True):
        assert_same(found, ops.tanimoto_topk(queries[:, :width], database[:, :width], 5))


def test_rows_at_any_byte():
    memory = torch.empty(3 + 100 * 24, dtype=torch.uint8)
    database = memory[3:].view(100, 24)
    database.copy_(rows(100, 24))
    assert_same(ops.tanimoto_topk(database, database, 3), ops.tanimoto_topk(database.clone(), database.clone(), 3))


def test_wrong_arguments():
    good = rows(3, 24)
    for queries, database, k, threshold, message in [
        (good[:, :20], good, 1, 0.0, r"queries must be \[N, bytes\] with bytes a multiple of 8, .* got \[3, 20\]"),
        (good, good[0], 1, 0.0, r"database must be \[N, bytes\]"),
        (good, rows(3, 128), 1, 0.0, "queries have 24 bytes a row and the database 128"),
        (good, good, -1, 0.0, "k must not be negative, got -1"),
        (good, good, 1, 1.5, r"threshold must be in \[0, 1\], got 1.5"),
        (good, good, 1, float("nan"), "threshold must be in"),
        (rows(1, 4096), rows(1, 4096), 1, 0.0, "at most 4088"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.tanimoto_topk(queries, database, k, threshold=threshold)
    with pytest.raises(TypeError, match="queries must be uint8, got Float"):
        ops.tanimoto_topk(good.float(), good, 1)


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [24, 100 * 24, 1 << 26])
@pytest.mark.parametrize(("k", "threshold"), [(1, 0.0), (20, 0.0), (20, 0.2), (400, 0.0)])
def test_any_source_in_any_chunks(chunk, k, threshold, tmp_path, monkeypatch):
    monkeypatch.setattr(screening, "_CHUNK", chunk)
    database, queries = rows(350, 24, 1), rows(9, 24, 2)
    expected = ops.tanimoto_topk(queries, database, k, threshold=threshold)
    saved = Fingerprints(database.numpy(), 166, "maccs")
    saved.save(tmp_path / "a.npz")
    locked = database.numpy().copy()
    locked.flags.writeable = False
    sources = [database, locked, saved, tmp_path / "a.npz", str(tmp_path / "a.npz"), iter(database.split(97))]
    for source in sources:
        assert_same(tanimoto_topk(queries, source, k, threshold=threshold), expected)
    assert_same(tanimoto_topk(Fingerprints(queries.numpy(), 166, "maccs"), saved, k, threshold=threshold), expected)


def test_a_stream_that_is_empty():
    for source in ([], rows(0, 24), [rows(0, 24)] * 2):
        similarity, index = tanimoto_topk(rows(2, 24), source, 3)
        assert (index == -1).all()
        assert (similarity == 0).all()


def test_kinds_must_be_the_same():
    bits = rows(2, 128).numpy()
    with pytest.raises(ValueError, match="database: expected morgan fingerprints like the queries, got ecfp"):
        tanimoto_topk(Fingerprints(bits, 1024, "morgan"), Fingerprints(bits, 1024, "ecfp"), 1)


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path):
    pytest.importorskip("rdkit")
    from test_fingerprints import smiles

    path = tmp_path / "library.smi"
    path.write_text("\n".join(f"{text} m{i}" for i, text in enumerate(smiles(60))) + "\nbroken( b\n")
    return path


def test_screen_writes_the_hits(library, tmp_path, capsys):
    queries = tmp_path / "queries.smi"
    queries.write_text("OCC ethanol\nCC(=O)Oc1ccccc1C(=O)O aspirin\n")
    saved, hits, again = tmp_path / "library.npz", tmp_path / "hits.csv", tmp_path / "again.csv"
    assert main(["fingerprints", str(library), "--out", str(saved), "--kind", "maccs", "--strict"]) == 3
    output = capsys.readouterr()
    assert "skipped record 61" in output.err
    assert "60 maccs fingerprints, 1 record skipped" in output.out
    assert main(["screen", str(queries), "--database", str(saved), "-k", "3", "-o", str(hits)]) == 0
    assert "6 hits of 2 queries in 60 molecules" in capsys.readouterr().out
    assert main(["screen", str(queries), "--database", str(library), "--kind", "maccs", "-k3", "-o", str(again)]) == 0
    assert hits.read_bytes() == again.read_bytes()
    with open(hits, newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == ["query", "rank", "index", "name", "smiles", "similarity"]
    assert [(row["query"], row["rank"]) for row in table[2:5]] == [("ethanol", "3"), ("aspirin", "1"), ("aspirin", "2")]
    database = Fingerprints.load(saved)
    wanted = fingerprints(["CCO", "CC(=O)Oc1ccccc1C(=O)O"], "maccs")
    similarity, index = tanimoto_topk(wanted, database, 3)
    assert [float(row["similarity"]) for row in table] == similarity.flatten().tolist()
    assert [int(row["index"]) for row in table] == index.flatten().tolist()
    for row in table:
        assert row["smiles"] == database.smiles[int(row["index"])]
        assert row["name"] == database.names[int(row["index"])]


def test_screen_says_what_is_wrong(library, tmp_path, capsys):
    empty, saved, hits = tmp_path / "empty.smi", tmp_path / "a.npz", tmp_path / "hits.csv"
    empty.write_text("\n")
    assert main(["fingerprints", str(library), "--out", str(saved), "--kind", "maccs"]) == 0
    for arguments, code, message in [
        ([str(empty), "--database", str(saved)], 1, f"no molecule in {empty}"),
        ([str(library), "--database", str(saved), "--kind", "morgan"], 1, "different kinds"),
        ([str(library), "--database", str(tmp_path / "none.npz")], 1, "No such file"),
        ([str(library), "--database", str(library), "--threshold", "2"], 2, "expected a number from 0 to 1"),
    ]:
        try:
            found = main(["screen", *arguments, "-o", str(hits)])
        except SystemExit as stop:
            found = stop.code
        assert found == code
        assert message in capsys.readouterr().err
        assert not hits.exists()
    assert main(["fingerprints", str(library), "--out", str(tmp_path / "a.csv")]) == 2
