"""Fingerprints are RDKit's, bit for bit, and come back from their files as they went in."""

import os
import subprocess
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rdkit")

from rdkit import Chem, RDConfig
from rdkit.Chem import MACCSkeys, rdFingerprintGenerator

from fastnuggets.molecules import Fingerprints, fingerprints_of_file
from fastnuggets.molecules import fingerprints as module
from fastnuggets.molecules.fingerprints import BITS, KINDS, fingerprints, pack, unpack

WIDTHS = {"maccs": 24, "morgan": 128}


def smiles(count: int) -> list[str]:
    """Real molecules: the first of the NCI's, as RDKit ships them."""
    with open(Path(RDConfig.RDDataDir) / "NCI" / "first_5K.smi") as file:
        return [line.split()[0] for line in islice(file, count)]


def by_rdkit(kind: str, text: str) -> list[int]:
    mol = Chem.MolFromSmiles(text)
    if kind == "maccs":
        return list(MACCSkeys.GenMACCSKeys(mol))[1:]
    return list(rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=1024).GetFingerprint(mol))


def same(one: Fingerprints, other: Fingerprints) -> bool:
    return (
        np.array_equal(one.packed, other.packed)
        and (one.kind, one.bits) == (other.kind, other.bits)
        and (list(one.names), list(one.smiles)) == (list(other.names), list(other.smiles))
        and list(one.skipped) == list(other.skipped)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_bits_are_rdkits(kind):
    found = fingerprints(smiles(150), kind, processes=0)
    expected = [by_rdkit(kind, found.smiles[i]) for i in range(len(found))]
    assert len(found) >= 148
    assert found.packed.shape[1] == WIDTHS[kind]
    assert np.array_equal(found.unpack(), expected)
    assert np.array_equal(unpack(found.tensor(), BITS[kind]).numpy(), expected)
    assert not unpack(found.packed, 8 * WIDTHS[kind])[:, BITS[kind] :].any()


def test_molecules_as_smiles_and_with_hydrogens():
    texts = ["CCO", "c1ccccc1C(=O)[O-].[Na+]", "C[C@H](N)C(=O)O"]
    mols = [Chem.MolFromSmiles(text) for text in texts]
    expected = fingerprints(texts, "morgan").packed
    assert np.array_equal(fingerprints(mols, "morgan").packed, expected)
    assert np.array_equal(fingerprints(map(Chem.AddHs, mols), "morgan", processes=1).packed, expected)


def test_what_cannot_be_read_has_no_row():
    found = fingerprints(["CCO", "xx", "", "C(", "c1ccccc1"], "maccs")
    assert list(found.smiles) == ["CCO", "c1ccccc1"]
    assert found.positions().tolist() == [0, 4]
    assert [skipped.index for skipped in found.skipped] == [1, 2, 3]
    assert all(skipped.error for skipped in found.skipped)
    assert found.skipped[1].error == "no SMILES"
    for texts in ([], ["xx"]):
        none = fingerprints(texts, "morgan")
        assert none.packed.shape == (0, 128)
        assert none.unpack().shape == (0, 1024)


def test_any_number_of_processes(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 16)
    texts = smiles(100)
    texts[50] = "broken("
    expected = fingerprints(texts, "morgan", processes=0)
    assert same(fingerprints(iter(texts), "morgan", processes=2), expected)
    assert same(fingerprints(texts, "morgan"), expected)


def test_stopping_ends_the_processes(monkeypatch):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **o: started.append(popen(*a, **o)) or started[-1])

    def interrupted():
        yield from ["CCO"] * 2000
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fingerprints(interrupted(), "maccs", processes=2)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)


def test_a_process_that_dies_is_an_error(monkeypatch, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no memory')")
    monkeypatch.setattr(module._bits, "__file__", str(script))
    with pytest.raises(RuntimeError, match="a fingerprint process did not start: no memory"):
        fingerprints(["CCO"], "maccs", processes=1)


@pytest.mark.parametrize("bits", [0, 1, 8, 63, 64, 65, 166, 1024])
def test_pack_and_unpack(bits):
    given = np.random.default_rng(bits).integers(0, 2, (5, bits)).astype(np.uint8)
    packed = pack(given)
    assert packed.shape == (5, (bits + 63) // 64 * 8)
    assert packed.dtype == np.uint8
    assert np.array_equal(unpack(packed, bits), given)
    tensor = torch.from_numpy(given)
    assert np.array_equal(pack(tensor).numpy(), packed)
    assert torch.equal(pack(tensor.bool()), pack(3.5 * tensor))
    assert torch.equal(unpack(pack(tensor), bits), tensor)
    if bits:
        assert packed[0, 0] & 1 == given[0, 0]


def test_a_file_gives_back_what_was_saved(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (1000, 128), dtype=np.uint8)
    names = [f"näme {i}" * (i % 3) for i in range(1000)]
    saved = Fingerprints(rows, 1024, "morgan", names, ["C"] * 1000, [module.Skipped(3, "x", "no")])
    saved.save(tmp_path / "a.npz")
    assert os.listdir(tmp_path) == ["a.npz"]
    found = Fingerprints.load(tmp_path / "a.npz")
    assert same(found, saved)
    assert isinstance(found.packed, np.memmap)
    assert (found.names[-1], found.names[2:4]) == (names[-1], names[2:4])
    with pytest.raises(IndexError):
        found.names[1000]
    with np.load(tmp_path / "a.npz") as archive:
        assert np.array_equal(archive["packed"], rows)
    assert torch.equal(found.tensor(), torch.from_numpy(rows))
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        assert {member.date_time[0] for member in archive.infolist()} == {1980}  # the same bytes each time
    nothing = Fingerprints(rows[:0], 1024, "morgan")
    nothing.save(tmp_path / "a.npz")
    assert same(Fingerprints.load(tmp_path / "a.npz"), nothing)


def test_files_that_are_not_fingerprints(tmp_path):
    path = tmp_path / "a.npz"
    with pytest.raises(FileNotFoundError):
        Fingerprints.load(path)
    np.savez(path, packed=np.zeros((2, 8), np.uint8))
    with pytest.raises(ValueError, match=r"a\.npz is not a whole file of fingerprints"):
        Fingerprints.load(path)
    Fingerprints(np.zeros((100, 24), np.uint8), 166, "maccs").save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match="not a whole file"):
        Fingerprints.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("about.json", '{"format": "another"}')
    with pytest.raises(ValueError, match="it is another"):
        Fingerprints.load(path)


def test_fingerprints_of_a_file(tmp_path):
    path = tmp_path / "some.smi"
    path.write_text("OCC ethanol\nbad( broken\n\nc1ccccc1\n")
    found = fingerprints_of_file(path, "maccs", processes=0)
    assert list(found.names) == ["ethanol", "record 3"]
    assert list(found.smiles) == ["CCO", "c1ccccc1"]
    assert [(one.index, one.name) for one in found.skipped] == [(1, "broken")]
    assert np.array_equal(found.packed, fingerprints(["CCO", "c1ccccc1"], "maccs").packed)
    written = fingerprints_of_file(path, "maccs", out=tmp_path / "some.npz")
    assert same(written, found)
    assert sorted(os.listdir(tmp_path)) == ["some.npz", "some.smi"]


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 8)
    monkeypatch.setattr(module, "_KEEP", 2)
    path, out = tmp_path / "some.smi", tmp_path / "some.npz"
    path.write_text("\n".join([*smiles(60), "bad("]) + "\n")
    expected = fingerprints_of_file(path, "morgan", processes=0)
    read, starts = module.read_texts, []

    def stopped(*args, start, **options):
        starts.append(start)
        yield from islice(read(*args, start=start, **options), 30)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "read_texts", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fingerprints_of_file(path, "morgan", out=out, processes=0)
    assert not out.exists()
    # What a killed run wrote after its last state does not count.
    with open(tmp_path / "some.npz.partial" / "packed", "ab") as file:
        file.write(b"torn")
    monkeypatch.setattr(module, "read_texts", lambda *a, **o: (starts.append(o["start"]), read(*a, **o))[1])
    assert same(fingerprints_of_file(path, "morgan", out=out, processes=0), expected)
    assert starts[0] == 0 < starts[1] < starts[2]
    # Another input is another run.
    monkeypatch.setattr(module, "read_texts", stopped)
    with pytest.raises(KeyboardInterrupt):
        fingerprints_of_file(path, "morgan", out=out, processes=0)
    path.write_text("CCO\n")
    monkeypatch.setattr(module, "read_texts", read)
    assert list(fingerprints_of_file(path, "morgan", out=out).smiles) == ["CCO"]


def test_wrong_arguments():
    rows = np.zeros((2, 24), np.uint8)
    for arguments, message in [
        ((rows, 1024, "morgan"), r"packed: expected \[N, 128\] uint8 for 1024 bits, got \[2, 24\]"),
        ((rows.astype(np.int8), 166, "maccs"), "got .* int8"),
        ((rows, 166, "maccs", ["a"]), "names: expected 2 or none, got 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            Fingerprints(*arguments)
    with pytest.raises(ValueError, match="kind: expected one of maccs, morgan, got 'ecfp'"):
        fingerprints(["C"], "ecfp")
    with pytest.raises(ValueError, match="processes: expected 0 or more"):
        fingerprints(["C"], processes=-1)
    with pytest.raises(ValueError, match=r"packed: expected \[N, 24\] for 166 bits, got \[2, 8\]"):
        unpack(rows[:, :8], 166)
    with pytest.raises(ValueError, match=r"bits: expected \[N, B\]"):
        pack(rows[0])
