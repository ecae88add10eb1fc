"""Files, conformers, the coordinate table and ragged batches."""

import errno
import gzip
import importlib
import itertools
import os
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import fastnuggets
from fastnuggets import molecules as fm
from fastnuggets.molecules import _worker, embedding, files, table, workers

rdkit = pytest.importorskip("rdkit")
pytest.importorskip("pyarrow")

from rdkit import Chem, RDConfig, rdBase  # noqa: E402
from rdkit.Chem import rdDistGeom  # noqa: E402

NCI = Path(RDConfig.RDDataDir) / "NCI"
SDF = (NCI / "first_200.props.sdf").read_text()
SMILES = ["CCO", "c1ccccc1C(=O)N", "C1CC1Cl", "CS(=O)(=O)C", "OB(O)c1ccccc1", "[Na+].[Cl-]"]


@pytest.fixture
def smi(tmp_path):
    path = tmp_path / "some.smi"
    path.write_text("".join(f"{text} m{i}\n" for i, text in enumerate(SMILES)))
    return path


def reason(text: str) -> str:
    """What RDKit says of a broken record; before 2026.3 it does not hand over its messages."""
    return text if hasattr(rdBase, "CaptureErrorLog") else "RDKit cannot read it"


def block_3d(smiles: str, name: str) -> str:
    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    rdDistGeom.EmbedMolecule(mol, randomSeed=1)
    mol.SetProp("_Name", name)
    return Chem.MolToMolBlock(mol) + "$$$$\n"


def good(records):
    return [record for record in records if record.error is None]


def broken(records):
    return [(record.index, record.name, record.error) for record in records if record.error is not None]


# ---- batches


def ragged() -> fm.Molecules:
    """HCO with a hydrogen far off, no atom, H2, and one of N and Si."""
    coords = torch.tensor([[9.0, 9, 9], [0, 0, 0], [2, 0, 0], [1, 1, 1], [3, 1, 1], [5, 5, 5], [6, 6, 6]])
    numbers = torch.tensor([1, 6, 8, 1, 1, 7, 14], dtype=torch.uint8)
    return fm.Molecules(coords, numbers, torch.tensor([0, 3, 3, 5, 7]), list("abcd"), ["C=O", "", "[H][H]", "N[SiH3]"])


def test_a_batch_is_sliced_like_a_list():
    batch = ragged()
    assert len(batch) == 4
    assert batch[-1].names == ["d"]
    assert batch[-1].ptr.tolist() == [0, 2]
    assert batch[-1].numbers.tolist() == [7, 14]
    assert batch[1:3].ptr.tolist() == [0, 0, 2]
    assert batch[1:3].coords.data_ptr() == batch.coords[3:].data_ptr()
    assert len(batch[3:1]) == 0
    for index in ([3, 1, 0], torch.tensor([3, 1, 0])):
        assert batch[index].names == ["d", "b", "a"]
        assert batch[index].numbers.tolist() == [7, 14, 1, 6, 8]
        assert batch[index].smiles == ["N[SiH3]", "", "C=O"]
    assert batch[torch.tensor([False, False, True, True])].numbers.tolist() == [1, 1, 7, 14]
    assert batch[::-2].names == ["d", "b"]
    with pytest.raises(IndexError):
        batch[4]


def test_a_batch_is_put_together_again_and_walked_through():
    batch = ragged()
    again = fm.Molecules.cat([batch[i] for i in range(4)])
    assert again.ptr.tolist() == batch.ptr.tolist()
    assert torch.equal(again.coords, batch.coords)
    assert [part.names for part in batch.batches(3)] == [["a", "b", "c"], ["d"]]
    orders = [
        [
            name
            for part in batch.batches(3, shuffle=True, generator=torch.Generator().manual_seed(seed))
            for name in part.names
        ]
        for seed in (1, 1, 2, 3, 4)
    ]
    assert sorted(orders[0]) == list("abcd")
    assert orders[0] == orders[1]
    assert any(order != orders[0] for order in orders)
    loader = torch.utils.data.DataLoader(batch, batch_size=2, collate_fn=fm.Molecules.cat)
    assert [part.ptr.tolist() for part in loader] == [[0, 3, 3], [0, 2, 4]]
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        next(batch.batches(0))


def test_channels_follow_the_list_of_elements():
    batch = ragged()
    kept = batch.keep(("N", "O", "C"))
    assert kept.ptr.tolist() == [0, 2, 2, 2, 3]
    assert kept.channels(("N", "O", "C")).tolist() == [2, 1, 0]
    assert batch.elements() == {"H": 3, "C": 1, "N": 1, "O": 1, "Si": 1}
    with pytest.raises(ValueError, match="no channel for H, Si"):
        batch.channels(("N", "O", "C"))
    with pytest.raises(ValueError, match="got 'Cc'"):
        batch.channels(("C", "Cc"))
    with pytest.raises(ValueError, match="each once"):
        batch.keep(("C", "C"))
    with pytest.raises(TypeError, match="the string 'CN'"):
        batch.keep("CN")


def test_the_centre_is_that_of_the_heavy_atoms():
    expected = [[1, 0, 0], [0, 0, 0], [2, 1, 1], [5.5, 5.5, 5.5]]
    assert ragged().center().tolist() == expected


def test_radii_are_given_for_known_elements_only():
    assert fm.bondi_radii(("C", "H", "Br")).tolist() == pytest.approx([1.70, 1.20, 1.85])
    with pytest.raises(ValueError, match="no Bondi radius is known for Fe"):
        fm.bondi_radii(("C", "Fe"))


def test_a_batch_must_fit_together():
    batch = ragged()
    with pytest.raises(ValueError, match="coords: expected"):
        fm.Molecules(batch.coords[:-1], batch.numbers, batch.ptr, batch.names, batch.smiles)
    with pytest.raises(ValueError, match="ptr: expected"):
        fm.Molecules(batch.coords, batch.numbers, batch.ptr[1:], batch.names, batch.smiles)
    with pytest.raises(ValueError, match="smiles: expected 4"):
        fm.Molecules(batch.coords, batch.numbers, batch.ptr, batch.names, batch.smiles[1:])


# ---- reading


def test_rubbish_among_smiles_is_counted_and_named(tmp_path, capfd):
    lines = (NCI / "first_5K.smi").read_text().splitlines()[:297]
    lines[100:100] = ["C1CC rub", "CN(C)(C)(C)C bish", "\x00\xff%%% "]
    path = tmp_path / "rubbish.smi"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    records = list(fm.read(path))
    assert [record.index for record in records] == list(range(1, 301))
    assert broken(records)[0] == (101, "rub", reason("unclosed ring for input: 'C1CC'"))
    valence = reason("Explicit valence for atom # 1 N, 5, is greater than permitted")
    assert broken(records)[1] == (102, "bish", valence)
    assert broken(records)[2][:2] == (103, "record 103")
    assert len(good(records)) == 297
    assert fm.count_records(path) == 300
    assert capfd.readouterr() == ("", "")


def test_a_header_blank_lines_and_missing_names_are_usual_in_smiles_files(tmp_path):
    path = tmp_path / "x.smi.gz"
    path.write_bytes(gzip.compress(b"SMILES name\n\nC1=CC=CC=C1\r\nOCC\tethanol of wine\n\n"))
    assert [(r.name, r.smiles) for r in fm.read(path)] == [("record 1", "c1ccccc1"), ("ethanol of wine", "CCO")]


def test_an_sdf_cut_in_half_gives_its_whole_records(tmp_path, capfd):
    path = tmp_path / "half.sdf"
    path.write_text(SDF[: SDF.index("M  END", len(SDF) // 2)])
    records = list(fm.read(path))
    assert broken(records) == [
        (len(records), f"record {len(records)}", "the record is cut off: it has no 'M  END' line")
    ]
    whole = list(fm.read(NCI / "first_200.props.sdf"))
    assert [r.smiles for r in good(records)] == [r.smiles for r in whole[: len(records) - 1]]
    assert len(whole) == fm.count_records(NCI / "first_200.props.sdf") == 200
    assert fm.count_records(path) == len(records)
    assert capfd.readouterr().err == ""


def test_a_compressed_sdf_cut_in_half_gives_its_whole_records(tmp_path):
    path = tmp_path / "half.sdf.gz"
    packed = gzip.compress(SDF.encode())
    path.write_bytes(packed[: len(packed) // 2])
    records = list(fm.read(path))
    assert len(good(records)) > 10
    assert [error for *_, error in broken(records)] == [records[-1].error]
    assert "compressed file is damaged" in records[-1].error
    assert fm.count_records(path) >= len(records)


def test_a_corrupt_record_does_not_hide_its_neighbours(tmp_path, capfd):
    parts = SDF.split("$$$$\n")[:4]
    lines = parts[1].split("\n")
    lines[4] = lines[4][:31] + "Xx" + lines[4][33:]
    parts[1] = "\n".join(lines)
    parts[2] = parts[2].replace("V2000", "V9000")
    path = tmp_path / "corrupt.sdf"
    path.write_text("$$$$\n".join(parts) + "$$$$\n")
    records = list(fm.read(path))
    assert [record.error is None for record in records] == [True, False, False, True]
    assert records[1].error == reason("Element 'Xx' not found")
    assert capfd.readouterr().err == ""


def test_tables_of_smiles_are_read_by_column(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('\ufeffid,"SMILES",split\nA,CCO,train\nB\n"C,1",c1ccccc1,test\nD,C1CC,test\n', encoding="utf-8")
    records = list(fm.read(path))
    assert [(r.index, r.name, r.smiles) for r in good(records)] == [(1, "A", "CCO"), (3, "C,1", "c1ccccc1")]
    assert broken(records) == [(2, "B", "no SMILES"), (4, "D", reason("unclosed ring for input: 'C1CC'"))]
    path.write_text("a;b\nCC;x\n")
    with pytest.raises(ValueError, match="no column is called smiles; name one of a, b"):
        list(fm.read(path))
    assert [(r.name, r.smiles) for r in fm.read(path, column="a", name_column="b")] == [("x", "CC")]
    with pytest.raises(ValueError, match="no column is called 'c'; there are a, b"):
        list(fm.read(path, column="c"))


def test_parquet_with_smiles_is_read_by_column(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"smiles": ["CCO", None, "C1CC"], "id": [7, 8, 9]}), path)
    records = list(fm.read(path))
    assert [(r.name, r.smiles) for r in good(records)] == [("7", "CCO")]
    assert [name for _, name, _ in broken(records)] == ["8", "9"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        list(fm.read(path))


def test_the_ligands_of_a_pdb_are_its_groups_of_hetero_atoms(tmp_path):
    ligand = Chem.MolFromMolBlock(block_3d("CCO", "x"))
    atoms = [line for line in Chem.MolToPDBBlock(ligand).splitlines() if line.startswith("HETATM")]
    second = [line[:16] + "B" + line[17:30] + "  99.000" + line[38:] for line in atoms]
    text = [
        "SEQRES   1 A    2  GLY MSE",
        "HETATM   90  CA  MSE A   2       7.000   0.000   0.000  1.00  0.00           C",
        "HETATM   91  CB  MSE A   2       7.000   1.500   0.000  1.00  0.00           C",
        "ATOM      1  CA  GLY A   1       0.000   0.000   0.000  1.00  0.00           C",
        *(line[:17] + "LIG B 201" + line[26:] for line in atoms + second),
        "HETATM   50  O   HOH A 301      11.000  11.000  11.000  1.00  0.00           O",
        "HETATM   51 ZN    ZN A 302      15.000  11.000  11.000  1.00  0.00          ZN",
        "END",
    ]
    path = tmp_path / "complex.pdb"
    path.write_text("\n".join(text) + "\n")
    (record,) = fm.read(path)
    assert (record.name, record.smiles) == ("LIG B 201", "CCO")
    (conformer,) = fm.conformers([record])
    assert conformer.numbers.tolist() == [6, 6, 8]
    assert np.abs(conformer.coords - ligand.GetConformer().GetPositions()).max() < 1e-3  # three decimals in the file


@pytest.mark.parametrize("name", ["x.smi", "x.sdf", "x.csv", "x.pdb", "x.smi.gz"])
def test_an_empty_file_has_no_records(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"")
    assert list(fm.read(path)) == []
    assert fm.count_records(path) == 0


def test_a_file_that_cannot_be_read_at_all_is_an_error_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file or directory.*none\.smi"):
        fm.read(tmp_path / "none.smi")
    (tmp_path / "x.xyz").touch()
    with pytest.raises(ValueError, match=r"expected a file ending in \.sdf .* got \.xyz"):
        fm.read(tmp_path / "x.xyz")


def test_reading_can_start_further_on(smi):
    assert [(r.index, r.name) for r in fm.read(smi, start=4)] == [(5, "m4"), (6, "m5")]


def test_the_package_is_imported_without_its_extra(monkeypatch, smi):
    monkeypatch.setattr(fastnuggets, "molecules", fm)  # so that it is put back
    for name in [name for name in sys.modules if name.startswith("fastnuggets.molecules")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("rdkit", "rdkit.Chem", "pyarrow", "pyarrow.parquet", "zarr", "tqdm"):
        monkeypatch.setitem(sys.modules, name, None)
    fresh = importlib.import_module("fastnuggets.molecules")
    assert fresh is not fm
    with pytest.raises(ImportError, match=r"fastnuggets\[molecules\]"):
        fresh.read(smi)


@pytest.mark.parametrize("module", ["rdkit.Chem", "pyarrow"])
def test_a_missing_extra_is_named(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ImportError, match=rf"{module.split('.')[0]} is not installed: pip install 'fastnuggets\[molecules\]'"
    ):
        files.need(module)


# ---- conformers


def test_conformers_do_not_depend_on_the_processes_nor_on_the_order(smi):
    records = list(fm.read(smi))
    alone = list(fm.conformers(records, processes=0))
    spread = list(fm.conformers(records[::-1], processes=2))[::-1]
    for mine, theirs, record in zip(alone, spread, records, strict=True):
        assert mine.error is None
        assert mine.coords.tobytes() == theirs.coords.tobytes()
        assert [atom.GetAtomicNum() for atom in Chem.AddHs(record.mol).GetAtoms()] != []
        assert mine.numbers.tolist() == [
            atom.GetAtomicNum() for atom in Chem.AddHs(Chem.MolFromSmiles(record.smiles)).GetAtoms()
        ]
    other = list(fm.conformers(records, processes=0, seed=1))
    assert other[0].coords.tobytes() != alone[0].coords.tobytes()
    plain = list(fm.conformers(records, processes=0, optimize=False))
    assert plain[0].coords.tobytes() != alone[0].coords.tobytes()


def test_molecules_with_coordinates_keep_them(tmp_path):
    path = tmp_path / "mixed.sdf"
    text = block_3d("CCO", "solid")
    path.write_text(text + SDF.split("$$$$\n")[0] + "$$$$\n")
    solid, flat = fm.conformers(fm.read(path), processes=0)
    positions = Chem.MolFromMolBlock(text, removeHs=False).GetConformer().GetPositions()
    assert solid.name == "solid"
    assert np.array_equal(solid.coords, positions.astype(np.float32))
    assert (solid.numbers == 1).sum() == 6
    assert flat.error is None
    assert np.ptp(flat.coords[:, 2]) > 0.1


@pytest.mark.parametrize("optimize", [True, False])
def test_the_fragments_of_a_salt_do_not_overlap(tmp_path, optimize):
    path = tmp_path / "x.smi"
    path.write_text("CSC(=N)N.O=S(=O)(O)O\nNN.OB1OB(OB2OB(O)O2)O1\n[Na+].[Cl-]\nCC.CC.CC\n")
    for record, conformer in zip(
        fm.read(path), fm.conformers(fm.read(path), processes=0, optimize=optimize), strict=True
    ):
        parts = [list(part) for part in Chem.GetMolFrags(Chem.AddHs(Chem.MolFromSmiles(record.smiles)))]
        for first, second in itertools.combinations([torch.from_numpy(conformer.coords[part]) for part in parts], 2):
            assert torch.cdist(first, second).min() > 1.5  # the length of a hydrogen bond; RDKit alone gives 0.0 to 0.6


def test_what_cannot_be_embedded_is_named(tmp_path):
    path = tmp_path / "x.smi"
    path.write_text("*CC dummy\nC1CC broken\nCC fine\n")
    records = list(fm.conformers(fm.read(path), processes=0))
    assert broken(records) == [
        (1, "dummy", "it has a dummy atom"),
        (2, "broken", reason("unclosed ring for input: 'C1CC'")),
    ]
    assert [len(record.numbers) for record in records] == [0, 0, 8]
    assert len(fm.Molecules.from_conformers(records)) == 1


def test_coordinates_that_are_not_finite_are_a_failure(tmp_path):
    mol = Chem.MolFromMolBlock(block_3d("CCO", "x"))
    mol.GetConformer().SetAtomPosition(0, (float("nan"), 0, 0))
    (result,) = fm.conformers([fm.Record(1, "x", "CCO", mol, None)], processes=0)
    assert result.error == "its coordinates are not finite"


def test_the_cache_is_found_by_content(smi, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    records = list(fm.read(smi))
    first = list(fm.conformers(records, processes=0, cache=cache))

    def refuse(*task):
        raise AssertionError("made again")

    with monkeypatch.context() as patch:
        patch.setattr(_worker, "embed", refuse)
        renamed = [record._replace(name="other") for record in records]
        again = list(fm.conformers(renamed, processes=0, cache=cache))
        assert [c.coords.tobytes() for c in again] == [c.coords.tobytes() for c in first]
        assert {c.name for c in again} == {"other"}
        for change in ({"seed": 1}, {"optimize": False}):
            with pytest.raises(AssertionError, match="made again"):
                list(fm.conformers(records, processes=0, cache=cache, **change))
    (stored,) = cache.rglob("*.parquet")
    stored.write_bytes(stored.read_bytes()[:100])
    mended = list(fm.conformers(records, processes=0, cache=cache))
    assert [c.coords.tobytes() for c in mended] == [c.coords.tobytes() for c in first]
    assert [path.name for path in cache.rglob("*") if path.is_file()] == [stored.name]


def test_finished_chunks_stay_when_the_work_is_interrupted(smi, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", 2)
    records = list(fm.read(smi))

    def stream():
        yield from records[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(fm.conformers(stream(), processes=0, cache=tmp_path))
    assert len(list(tmp_path.rglob("*.parquet"))) == 1


def test_a_dead_worker_costs_one_molecule(smi):
    with embedding._Embedders(1, 60.0) as pool:
        task = ("CCO", 1, True, 60.0)
        assert pool.submit(*task).result()[2] == ""
        (process,) = pool._live
        os.kill(process.popen.pid, signal.SIGKILL)
        process.popen.wait()
        numbers, coords, reason, final = pool.submit(*task).result()
        assert (numbers, coords, reason, final) == (b"", b"", "its worker process died (SIGKILL)", False)
        assert pool.submit(*task).result()[2] == ""


def test_a_molecule_that_takes_too_long_is_a_failure(monkeypatch):
    timer = threading.Timer
    monkeypatch.setattr(threading, "Timer", lambda limit, kill: timer(limit / 100, kill))
    with embedding._Embedders(1, 0.5) as pool:
        *_, reason, final = pool.submit("C" * 400, 1, True, 60.0).result()
    assert reason == "its worker process died (SIGKILL)"
    assert not final


def test_workers_end_with_the_iterator(smi, monkeypatch):
    started = []
    monkeypatch.setattr(
        workers._Process,
        "answer",
        lambda self, ask=workers._Process.answer: started.append(self) or ask(self),
    )
    stream = fm.conformers(list(fm.read(smi)) * 30, processes=2)
    next(stream)
    stream.close()
    assert started
    assert all(process.popen.returncode is not None for process in started)


def test_a_worker_that_cannot_start_says_why(smi, monkeypatch):
    monkeypatch.setattr(embedding._worker, "__file__", "/nowhere/worker.py")
    with pytest.raises(RuntimeError, match=r"a conformer process did not start: .*No such file"):
        list(fm.conformers(fm.read(smi), processes=1))


# ---- table


def test_the_table_gives_back_what_was_saved(smi, tmp_path, monkeypatch):
    monkeypatch.setattr(table, "_ROW_GROUP", 4)
    made = list(fm.conformers(fm.read(smi), processes=0))
    molecules = fm.Molecules.from_conformers(made)
    path = tmp_path / "m.parquet"
    assert fm.save_table(path, molecules.batches(1)) == len(SMILES)
    assert table.open_parquet(path).metadata.num_row_groups == 2
    loaded = fm.load_table(path)
    for name in ("coords", "numbers", "ptr"):
        assert torch.equal(getattr(loaded, name), getattr(molecules, name))
        assert getattr(loaded, name).dtype == getattr(molecules, name).dtype
    assert list(loaded.names) == [f"m{i}" for i in range(len(SMILES))]
    assert loaded.smiles == molecules.smiles
    records = list(fm.read(path))
    assert [r.smiles for r in records] == loaded.smiles
    again = fm.Molecules.from_conformers(fm.conformers(records, processes=0))
    assert torch.equal(again.coords, molecules.coords)
    assert Chem.MolToSmiles(Chem.RemoveHs(records[1].mol)) == loaded.smiles[1]


def test_tables_of_nothing_and_of_molecules_without_atoms(tmp_path):
    path = tmp_path / "m.parquet"
    assert fm.save_table(path, fm.Molecules.from_conformers([])) == 0
    assert len(fm.load_table(path)) == 0
    fm.save_table(path, ragged())
    assert fm.load_table(path).ptr.tolist() == ragged().ptr.tolist()
    fm.save_table(path, ragged()[1:])
    assert fm.load_table(path).numbers.tolist() == [1, 1, 7, 14]


def test_a_table_is_replaced_only_by_a_whole_one(tmp_path):
    path = tmp_path / "m.parquet"
    fm.save_table(path, ragged())

    def stream():
        yield ragged()
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fm.save_table(path, stream())
    assert os.listdir(tmp_path) == ["m.parquet"]
    assert len(fm.load_table(path)) == 4


def test_a_file_that_is_no_table_is_refused(tmp_path):
    path = tmp_path / "m.parquet"
    path.write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not a whole Parquet file"):
        fm.load_table(path)


# ---- bonds


def test_bonds_are_found_as_far_as_the_atoms_tell():
    from fastnuggets.molecules.bonds import bonded, sdf_record

    mol = Chem.MolFromMolBlock(block_3d("CC(=O)Nc1ccccc1", "x"), removeHs=False)
    numbers, coords = [atom.GetAtomicNum() for atom in mol.GetAtoms()], mol.GetConformer().GetPositions()
    full, level = bonded(numbers, coords)
    assert (level, Chem.MolToSmiles(Chem.RemoveHs(full))) == ("bond orders", "CC(=O)Nc1ccccc1")
    heavy = [i for i, number in enumerate(numbers) if number > 1]
    joined, level = bonded([numbers[i] for i in heavy], coords[heavy])
    assert (level, joined.GetNumBonds()) == ("single bonds", 10)
    crowd, level = bonded([6] * 9, np.random.default_rng(0).normal(size=(9, 3)) * 0.4)
    assert (level, crowd.GetNumAtoms(), crowd.GetNumBonds()) == ("atoms only", 9, 0)
    for atoms in (full, joined, crowd, bonded([], np.empty((0, 3)))[0]):
        text = sdf_record(atoms, "two\nlines", {"k": "v"})
        assert text.startswith("two lines\n")
        assert text.endswith(">  <k>\nv\n\n$$$$\n")
        again = Chem.MolFromMolBlock(text, sanitize=False, removeHs=False)
        assert again.GetNumAtoms() == atoms.GetNumAtoms()
