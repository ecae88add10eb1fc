"""The command: what it writes, what it says, its exit codes, and what survives an interruption or a full disk."""

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import fastnuggets
from fastnuggets import cli

rdkit = pytest.importorskip("rdkit")
pytest.importorskip("zarr", minversion="3")

from rdkit import Chem  # noqa: E402

from fastnuggets import molecules as fm  # noqa: E402
from fastnuggets.ops import voxelize  # noqa: E402

SMALL = ("--shape", "12", "--spacing", "1", "--kernel", "gaussian", "--sigma", "0.8")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Work in a folder of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def smi():
    path = Path("some.smi")
    path.write_text("CCO ethanol\nC1CC broken\nC[Si](C)(C)C silane\nc1ccccc1C(=O)N amide\n")
    return str(path)


def run(*arguments: str) -> int:
    return cli.main([*map(str, arguments)])


def test_help_says_what_there_is_and_what_the_exit_codes_mean(capsys):
    for arguments in ([], ["voxelize"], ["invert"], ["conformers"], ["info"]):
        with pytest.raises(SystemExit) as end:
            run(*arguments, "--help")
        assert end.value.code == 0
        text = capsys.readouterr().out
        assert "130  interrupted" in text
        assert not arguments or arguments[0] in text
    with pytest.raises(SystemExit):
        run("--version")
    assert capsys.readouterr().out == f"fastnuggets {fastnuggets.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["voxelize", "x.smi"],
        ["voxelize", "x.smi", "--out", "g.zarr", "--elements", "C,Qq"],
        ["voxelize", "x.smi", "--out", "g.zarr", "--shape", "0"],
        ["voxelize", "x.smi", "--out", "g.zarr", "--shape", "8,8"],
        ["voxelize", "x.smi", "--out", "g.zarr", "--spacing", "-1"],
        ["voxelize", "x.smi", "--out", "g.zarr", "--spacing", "nan"],
        ["voxelize", "x.smi", "--out", "g.zarr", "--sigma", "0"],
        ["voxelize", "x.smi", "--out", "g.zarr", "--device", "abacus"],
        ["invert", "g.zarr", "--out", "a.sdf", "--device", "cuda:99"],
    ],
)
def test_a_wrong_command_line_ends_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == cli.USAGE
    assert "error:" in capsys.readouterr().err


def test_arguments_that_do_not_fit_together_end_with_2(smi, capsys):
    assert run("voxelize", smi, "--out", "g.zarr", "--kernel", "sphere", "--sigma", "1") == cli.USAGE
    assert capsys.readouterr().err == "fastnuggets: error: --sigma has no meaning for --kernel sphere\n"


def test_info_tells_versions_build_and_devices(capsys):
    assert run("info") == cli.OK
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert lines["fastnuggets"] == fastnuggets.__version__
    assert lines["torch"] == torch.__version__
    assert lines["rdkit"].startswith("20")
    assert {"python", "cpu"} <= set(lines)


def test_voxelize_writes_what_the_op_computes(smi, capsys):
    options = ["--processes", "0", "--dtype", "float32", "--elements", "C,N,O", "--shape", "20,24,28", "--sigma", "0.9"]
    assert run("voxelize", smi, "--out", "g.zarr", *options) == cli.OK
    said = capsys.readouterr()
    assert said.out == (
        "g.zarr: 3 molecules as float32 grids [3, 20, 24, 28], 1 record skipped (named in g.zarr.skipped.tsv)\n"
    )
    broken = next(fm.read(smi, start=1)).error
    assert f"skipped record 2 (broken): {broken}\n" in said.err
    assert "atoms without a channel left out: Si 1" in said.err
    assert Path("g.zarr.skipped.tsv").read_text() == f"2\tbroken\t{broken}\n"
    grids = fm.open_grids("g.zarr")
    assert grids.info == fm.GridInfo(
        "wave", ("C", "N", "O"), (20, 24, 28), (0.5,) * 3, 0.9, 0.5, None, "float32", fastnuggets.__version__
    )
    assert grids.names == ["ethanol", "silane", "amide"]
    batch = fm.Molecules.from_conformers(fm.conformers(fm.read(smi), processes=0))
    kept, center = batch.keep(grids.info.elements), batch.center()
    expected = voxelize(
        kept.coords,
        kept.channels(grids.info.elements),
        kept.ptr,
        shape=(20, 24, 28),
        num_channels=3,
        density="wave",
        sigma=0.9,
        omega=0.5,
        center=center,
    )
    assert np.array_equal(grids[:], expected.numpy())
    assert np.array_equal(grids.centers, center.numpy())


def test_kernels_with_a_radius_take_bondis(smi, capsys):
    options = ["--processes", "0", "--shape", "16", "--elements", "C,O"]
    assert run("voxelize", smi, "--out", "g.npz", "--kernel", "sphere", *options, "--center", "origin") == cli.OK
    info = fm.open_grids("g.npz").info
    assert info.radius == pytest.approx((1.70, 1.52))
    assert (info.sigma, info.omega) == (None, None)
    assert set(np.unique(fm.open_grids("g.npz")[:])) >= {0, 1}
    assert np.array_equal(fm.open_grids("g.npz").centers, np.zeros((3, 3)))
    assert run("voxelize", smi, "--out", "h.npz", "--kernel", "sphere", *options[:-1], "C,Fe") == cli.FAILED
    assert "no Bondi radius is known for Fe" in capsys.readouterr().err


def test_skipped_records_matter_if_asked(smi, capsys):
    assert (
        run("voxelize", smi, "--out", "g.npz", *SMALL, "--others", "skip", "--strict", "--processes", "0")
        == cli.SKIPPED
    )
    assert fm.open_grids("g.npz").names == ["ethanol", "amide"]
    assert "3\tsilane\tno channel for Si\n" in Path("g.npz.skipped.tsv").read_text()


def test_atoms_outside_the_box_are_told(capsys):
    Path("long.smi").write_text("CCCCCCCCCCCCCCCCCCCC long\nC short\n")
    assert run("voxelize", "long.smi", "--out", "g.npz", "--shape", "8", "--processes", "0") == cli.OK
    assert "molecules with an atom outside the box: 1\n" in capsys.readouterr().err


def test_the_table_goes_in_and_comes_out(smi, capsys):
    assert run("conformers", smi, "--out", "m.parquet", "--processes", "0") == cli.OK
    assert capsys.readouterr().out == "m.parquet: 3 molecules, 1 record skipped\n"
    for source, out in ((smi, "a.npz"), ("m.parquet", "b.npz")):
        assert run("voxelize", source, "--out", out, *SMALL, "--processes", "0") == cli.OK
    a, b = fm.open_grids("a.npz"), fm.open_grids("b.npz")
    assert (a.names, a.smiles) == (b.names, b.smiles)
    assert np.array_equal(a[:], b[:])


@pytest.mark.parametrize("elements", ["C,N,O,H", "C,N,O"])
def test_invert_gives_the_atoms_back_where_they_were(elements, capsys):
    Path("m.smi").write_text("CC(=O)Nc1ccccc1 acetanilide\nOCC ethanol\n")
    options = ["--shape", "36", "--processes", "0", "--center", "mean"]
    assert run("voxelize", "m.smi", "--out", "g.zarr", "--elements", elements, *options) == cli.OK
    assert run("invert", "g.zarr", "--out", "atoms.sdf") == cli.OK
    level = "bond orders" if "H" in elements else "single bonds"
    assert f"atoms.sdf: 2 molecules ({level} 2); atoms " in capsys.readouterr().out
    batch = fm.Molecules.from_conformers(fm.conformers(fm.read("m.smi"), processes=0)).keep(elements.split(","))
    for i, mol in enumerate(Chem.SDMolSupplier("atoms.sdf", removeHs=False, sanitize=False)):
        found = torch.from_numpy(mol.GetConformer().GetPositions()).float()
        numbers = torch.tensor([atom.GetAtomicNum() for atom in mol.GetAtoms()])
        distance = torch.cdist(found, batch[i].coords)
        # float16 grids give back every atom within 0.003 angstrom, and the file has four decimals.
        assert distance.min(0).values.max() < 0.02
        assert sorted(numbers.tolist()) == sorted(batch[i].numbers.tolist())
        assert torch.equal(batch[i].numbers[distance.argmin(1)].long(), numbers)
        assert mol.GetProp("_Name") == batch.names[i]
        if "H" in elements:
            assert Chem.MolToSmiles(Chem.RemoveHs(mol)) == batch.smiles[i]


def test_invert_needs_an_invertible_kernel(smi, capsys):
    assert run("voxelize", smi, "--out", "g.npz", "--kernel", "trilinear", "--shape", "8", "--processes", "0") == cli.OK
    assert run("invert", "g.npz", "--out", "a.sdf") == cli.FAILED
    assert "a wave or gaussian grid can be inverted, this one is trilinear" in capsys.readouterr().err
    assert not Path("a.sdf").exists()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["voxelize", "none.smi", "--out", "g.zarr"], "No such file or directory: none.smi"),
        (["voxelize", "empty.smi", "--out", "g.zarr"], "no molecule in empty.smi"),
        (["voxelize", "bad.smi", "--out", "g.npz"], "no molecule in bad.smi: 1 record skipped"),
        (["voxelize", "some.xyz", "--out", "g.zarr"], "expected a file ending in"),
        (["voxelize", "some.csv", "--out", "g.zarr"], "no column is called smiles; name one of a, b"),
        (["voxelize", "some.smi", "--out", "g.h5"], "expected a name ending in .zarr or .npz, got g.h5"),
        (["voxelize", "some.smi", "--out", "g.zarr", "--shape", "99999"], "the grid of one molecule takes 12,"),
        (
            ["voxelize", "many.smi", "--out", "g.npz", "--shape", "999"],
            "an npz is loaded whole, and 9999 grids of 13 GiB",
        ),
        (["conformers", "some.smi", "--out", "no/folder/m.parquet"], "No such file or directory: "),
        (["invert", "none.zarr", "--out", "a.sdf"], "No such file or directory: none.zarr"),
        (["invert", "some.csv", "--out", "a.sdf"], "some.csv: expected grids written by fastnuggets"),
    ],
)
def test_what_cannot_be_done_ends_with_1_and_one_clear_line(smi, arguments, reason, capfd, monkeypatch):
    for name, text in {
        "empty.smi": "",
        "bad.smi": "C1CC x\n",
        "some.xyz": "",
        "some.csv": "a,b\n1,2\n",
        "many.smi": "C\n" * 9999,
    }.items():
        Path(name).write_text(text)
    before = set(os.listdir())
    monkeypatch.setattr("fastnuggets.molecules.files.available_memory", lambda: 16 << 30)
    monkeypatch.setattr("fastnuggets.molecules.grids.available_memory", lambda: 16 << 30)
    assert run(*arguments, *(["--processes", "0", "--no-cache"] if arguments[0] != "invert" else [])) == cli.FAILED
    assert capfd.readouterr().err.splitlines()[-1].startswith("fastnuggets: error: ")
    assert set(os.listdir()) == before
    assert run(*arguments) == cli.FAILED
    assert reason in capfd.readouterr().err.splitlines()[-1]


def test_an_output_is_not_overwritten_by_chance(smi, capsys):
    arguments = ["voxelize", smi, "--out", "g.npz", *SMALL, "--processes", "0"]
    assert run(*arguments) == cli.OK
    assert run(*arguments) == cli.FAILED
    assert capsys.readouterr().err.endswith("error: the output exists already: g.npz\n")
    assert run(*arguments, "--overwrite", "--elements", "C") == cli.OK
    assert fm.open_grids("g.npz").info.elements == ("C",)


def test_a_missing_extra_is_named(smi, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zarr", None)
    assert run("voxelize", smi, "--out", "g.zarr") == cli.FAILED
    assert "zarr is not installed: pip install 'fastnuggets[molecules]'" in capsys.readouterr().err


def test_demo_gets_its_arguments(monkeypatch, capsys):
    got = []
    monkeypatch.setitem(sys.modules, "fastnuggets.demo", types.SimpleNamespace(main=lambda argv: got.append(argv)))
    assert run("demo", "--quick", "--out", "x") == cli.OK
    assert got == [["--quick", "--out", "x"]]

    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "fastnuggets.demo", types.SimpleNamespace(main=interrupted))
    assert run("demo") == cli.INTERRUPTED


# The command in a process of its own, with a Ctrl-C after the first batch that is on the disk.
INTERRUPTED = """
import signal, sys
from fastnuggets import cli
from fastnuggets.molecules import GridWriter
append = GridWriter.append
def then_interrupt(self, *args, **kwargs):
    append(self, *args, **kwargs)
    signal.raise_signal(signal.SIGINT)
GridWriter.append = then_interrupt
sys.exit(cli.main(sys.argv[1:]))
"""
# The same on a disk whose files may not grow beyond 2500 bytes, less than the grid of the largest molecule.
FULL_DISK = """
import resource, sys
from fastnuggets import cli
import fastnuggets.molecules, rdkit.Chem, zarr
resource.setrlimit(resource.RLIMIT_FSIZE, (2500, resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[1:]))
"""


def subprocess_run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "FASTNUGGETS_TEST": os.getcwd()}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env=environment
    )


def survivors() -> list[str]:
    """Processes that carry the mark of this test."""
    mark = f"FASTNUGGETS_TEST={os.getcwd()}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(capsys):
    lines = [f"{'C' * (i % 7 + 1)}{'NOSP'[i % 4]} m{i}" for i in range(150)]
    lines[70] = "C1CC broken"
    Path("m.smi").write_text("\n".join(lines))
    arguments = ["voxelize", "m.smi", "--no-cache", "--no-mmff", "--processes", "2", *SMALL]
    ended = subprocess_run(INTERRUPTED, *arguments, "--out", "g.zarr")
    assert ended.returncode == cli.INTERRUPTED
    assert "64 finished molecules are kept in g.zarr.partial; the same command goes on from there" in ended.stderr
    assert ended.stderr.endswith("fastnuggets: interrupted\n")
    assert "Traceback" not in ended.stderr
    assert not Path("g.zarr").exists()
    assert survivors() == []
    assert run(*arguments, "--out", "g.zarr") == cli.OK
    assert "going on from g.zarr.partial: 64 molecules are done" in capsys.readouterr().err
    assert not Path("g.zarr.partial").exists()
    assert run(*arguments, "--out", "whole.zarr") == cli.OK
    mine, whole = (
        {str(file.relative_to(root)): file.read_bytes() for file in Path(root).rglob("*") if file.is_file()}
        for root in ("g.zarr", "whole.zarr")
    )
    assert mine == whole
    assert Path("g.zarr.skipped.tsv").read_text() == Path("whole.zarr.skipped.tsv").read_text()
    assert len(fm.open_grids("g.zarr")) == 149


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_full_disk_is_one_clear_line_and_costs_nothing_finished():
    Path("m.smi").write_text("\n".join(["C a"] * 64 + ["CCCCCCCCCCCCCCCCCCCCCCCCCCC b"] * 2))
    arguments = ["voxelize", "m.smi", "--out", "g.zarr", "--no-mmff", "--processes", "0", "--no-cache", *SMALL]
    ended = subprocess_run(FULL_DISK, *arguments)
    assert ended.returncode == cli.FAILED
    kept, error = ended.stderr.splitlines()[-2:]
    assert kept.startswith("fastnuggets: 64 finished molecules are kept in g.zarr.partial")
    assert error.startswith("fastnuggets: error: the disk is full")
    assert "Traceback" not in ended.stderr
    assert not Path("g.zarr").exists()
    assert run(*arguments) == cli.OK
    assert len(fm.open_grids("g.zarr")) == 66


def test_a_signal_during_the_table_leaves_no_file(smi, monkeypatch):
    monkeypatch.setattr(fm.Molecules, "from_conformers", lambda group: signal.raise_signal(signal.SIGINT))
    assert run("conformers", smi, "--out", "m.parquet", "--processes", "0", "--no-cache") == cli.INTERRUPTED
    assert [name for name in os.listdir() if "parquet" in name] == []
