"""Stored grids: going on after an interruption, a full disk, and files that are something else."""

import errno
import os

import numpy as np
import pytest

from fastnuggets import molecules as fm
from fastnuggets.molecules import grids as grids_module

zarr = pytest.importorskip("zarr", minversion="3")

INFO = fm.GridInfo("wave", ("C", "O"), (4, 5, 6), (0.5, 0.5, 0.5), 1.0, 0.5, None, "float16", "0")


def rows(first: int, last: int) -> dict:
    values = np.arange(first, last, dtype=np.float16)[:, None, None, None, None] + np.zeros((1, 2, 4, 5, 6), np.float16)
    names = [f"m{i}" for i in range(first, last)]
    return {"grids": values, "centers": np.full((last - first, 3), first, np.float32), "names": names, "smiles": names}


@pytest.mark.parametrize("ending", ["zarr", "npz"])
def test_grids_go_on_after_an_interruption(tmp_path, ending):
    out = tmp_path / f"g.{ending}"
    writer = fm.GridWriter(out, INFO, capacity=9, key="k")
    writer.append(**rows(0, 3), consumed=4, skipped=[(2, "bad", "why")], notes={"n": 1})
    writer._group["grids"][3:5] = 7.0  # the beginning of a batch that was interrupted
    (tmp_path / f"g.{ending}.partial" / "store" / "grids" / "c.4.0123.partial").touch()
    assert not out.exists()
    writer = fm.GridWriter(out, INFO, capacity=9, key="k")
    assert (writer.consumed, writer.written, writer.skipped) == (4, 3, 1)
    writer.append(**rows(3, 7), consumed=9, skipped=[(9, "worse", "what")], notes={"n": 2})
    report = writer.finish()
    assert writer.notes == {"n": 3}
    assert report.read_text() == "2\tbad\twhy\n9\tworse\twhat\n"
    assert sorted(os.listdir(tmp_path)) == [f"g.{ending}", f"g.{ending}.skipped.tsv"]
    grids = fm.open_grids(out)
    assert grids.info == INFO
    assert len(grids) == 7
    assert grids[:].shape == (7, 2, 4, 5, 6)
    assert grids[2:5].dtype == np.float16
    assert grids[:][:, 1, 2, 3, 4].tolist() == list(range(7))
    assert grids.names == [f"m{i}" for i in range(7)]
    assert grids.centers[:, 0].tolist() == [0, 0, 0, 3, 3, 3, 3]
    if ending == "zarr":
        assert not list(out.rglob("*.partial"))
        assert len(list((out / "grids").glob("c.*"))) == 6  # the first grid is zero, and zarr stores no zeros
        assert zarr.open_group(out, mode="r").metadata.zarr_format == 3


@pytest.mark.parametrize("ending", ["zarr", "npz"])
def test_a_full_disk_costs_nothing_that_was_finished(tmp_path, monkeypatch, ending):
    out = tmp_path / f"g.{ending}"
    writer = fm.GridWriter(out, INFO, capacity=4)
    writer.append(**rows(0, 2), consumed=2)

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(grids_module, "sync", full)
        with pytest.raises(OSError, match="No space left"):
            writer.append(**rows(2, 4), consumed=4)
    assert (writer.consumed, writer.written) == (2, 2)
    writer = fm.GridWriter(out, INFO, capacity=4)
    writer.append(**rows(2, 4), consumed=4)
    with monkeypatch.context() as patch:
        patch.setattr(grids_module, "_pack", lambda group, info, file: full(out))
        if ending == "npz":
            with pytest.raises(OSError, match="No space left"):
                writer.finish()
            assert os.listdir(tmp_path) == ["g.npz.partial"]
            writer = fm.GridWriter(out, INFO, capacity=4)
    writer.finish()
    assert fm.open_grids(out)[:][:, 0, 0, 0, 0].tolist() == [0, 1, 2, 3]


def test_grids_are_not_mixed_nor_overwritten_by_chance(tmp_path):
    out = tmp_path / "g.zarr"
    fm.GridWriter(out, INFO, capacity=4, key="a").append(**rows(0, 2), consumed=2)
    with pytest.raises(ValueError, match="begun with other options or another input"):
        fm.GridWriter(out, INFO, capacity=4, key="b")
    writer = fm.GridWriter(out, INFO, capacity=4, key="b", restart=True)
    assert writer.consumed == 0
    writer.append(**rows(0, 1), consumed=1)
    writer.finish()
    with pytest.raises(FileExistsError, match="exists already"):
        fm.GridWriter(out, INFO, capacity=4)
    writer = fm.GridWriter(out, INFO, capacity=4, overwrite=True)
    writer.append(**rows(2, 4), consumed=2)
    assert len(fm.open_grids(out)) == 1
    writer.finish()
    assert fm.open_grids(out).names == ["m2", "m3"]
    (tmp_path / "h.zarr.partial").mkdir()
    (tmp_path / "h.zarr.partial" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match="in the way"):
        fm.GridWriter(tmp_path / "h.zarr", INFO, capacity=4)
    assert (tmp_path / "h.zarr.partial" / "thesis.txt").exists()


def test_an_npz_larger_than_memory_is_refused_before_work_begins(tmp_path):
    with pytest.raises(ValueError, match=r"1000000000000 grids of 480 B take up to 436.6 TiB.*write a \.zarr"):
        fm.GridWriter(tmp_path / "g.npz", INFO, capacity=10**12)
    with pytest.raises(ValueError, match=r"expected a name ending in \.zarr or \.npz"):
        fm.GridWriter(tmp_path / "g.h5", INFO, capacity=1)
    assert os.listdir(tmp_path) == []


def test_what_are_no_grids_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        fm.open_grids(tmp_path / "g.zarr")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="no zarr group"):
        fm.open_grids(tmp_path / "folder")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    np.savez(tmp_path / "other.npz", a=1)
    (tmp_path / "text.npz").write_text("text")
    for name in ("other.zarr", "other.npz", "text.npz"):
        with pytest.raises(ValueError, match=f"{name}: expected grids written by fastnuggets"):
            fm.open_grids(tmp_path / name)
    writer = fm.GridWriter(tmp_path / "g.npz", INFO, capacity=4)
    writer.append(**rows(0, 4), consumed=4)
    writer.finish()
    monkeypatch.setattr(grids_module, "available_memory", lambda: 100)
    with pytest.raises(ValueError, match=r"its grids take 2 KiB, and 100 B are free"):
        fm.open_grids(tmp_path / "g.npz")


def test_an_old_zarr_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(zarr, "__version__", "2.18.3")
    with pytest.raises(ImportError, match=r"grids need zarr 3, which needs Python 3\.11; zarr 2\.18\.3 is installed"):
        fm.GridWriter(tmp_path / "g.zarr", INFO, capacity=1)
    assert os.listdir(tmp_path) == []
