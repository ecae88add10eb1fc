"""Soups: values, files of every kind in and out, what is refused, memory, and what a kill or a full disk leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastnuggets import cli
from fastnuggets.commands import arguments
from fastnuggets.training import soup as soups
from fastnuggets.training.soup import average_checkpoints, greedy_soup

safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("tqdm")

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "conv.weight": torch.randn(8, 3, 3, 3, dtype=torch.bfloat16),
        "conv.bias": torch.randn(8, dtype=torch.float16),
        "norm.weight": torch.randn(7),
        "norm.running_var": torch.rand(7, dtype=torch.float64),
        "norm.num_batches_tracked": torch.tensor(10 * seed),
        "scale": torch.randn(()),
        "mask": torch.rand(5) > 0.5,
        "empty": torch.empty(0, 4),
        "größe": torch.randn(3),
    }


def save(*names: str) -> list[dict[str, torch.Tensor]]:
    models = [model(seed) for seed in range(len(names))]
    for name, tensors in zip(names, models, strict=True):
        if name.endswith(".safetensors"):
            safetensors.save_file(tensors, name)
        else:
            torch.save(tensors, name)
    return models


def expected(models, coefficients):
    """The definition, in float64."""
    return {
        key: sum(c * m[key].double() for c, m in zip(coefficients, models, strict=True))
        if models[0][key].is_floating_point()
        else models[-1][key]
        for key in models[0]
    }


def check(found, models, coefficients, dtype=None):
    truth = expected(models, coefficients)
    assert found.keys() == truth.keys()
    for key, value in truth.items():
        original = models[0][key].dtype
        want = dtype if dtype and original.is_floating_point else original
        assert found[key].dtype == want
        assert found[key].shape == value.shape
        if not original.is_floating_point:
            assert torch.equal(found[key], value)
            continue
        # One rounding to the output's type, and K + 1 of float32 sums of numbers below 10.
        sums = 1e-15 if torch.float64 in (want, original) and dtype is None else 3e-6
        tolerance = torch.finfo(want).eps / 2 * value.abs() + sums
        assert ((found[key].double() - value).abs() <= tolerance).all(), key


def test_the_mean_is_that_of_the_definition():
    models = save("a.safetensors", "b.safetensors", "c.safetensors")
    done = average_checkpoints(["a.safetensors", "b.safetensors", "c.safetensors"], "out.safetensors")
    assert done == ([Path("out.safetensors")], 9, 2, 0, [])
    check(safetensors.load_file("out.safetensors"), models, [1 / 3] * 3)
    # The number of the last file, not a rounded mean.
    assert safetensors.load_file("out.safetensors")["norm.num_batches_tracked"] == 20


def test_weights_are_used_as_given_and_a_sum_that_is_not_1_is_said():
    models = save("a.safetensors", "b.safetensors")
    with pytest.warns(UserWarning, match=r"the weights add up to 1\.5, not to 1, and are used as given"):
        average_checkpoints(["a.safetensors", "b.safetensors"], "out.safetensors", weights=[2, -0.5])
    check(safetensors.load_file("out.safetensors"), models, [2, -0.5])


def test_ema_is_the_recursion_over_the_files_in_their_order():
    names = [f"{i}.safetensors" for i in range(5)]
    models = save(*names)
    average_checkpoints(names, "out.safetensors", ema=0.7)
    average = {key: value.double() for key, value in models[0].items() if value.is_floating_point()}
    for later in models[1:]:
        average = {key: 0.7 * value + 0.3 * later[key].double() for key, value in average.items()}
    check(safetensors.load_file("out.safetensors"), models, soups._coefficients(5, None, 0.7))
    for key, value in expected(models, soups._coefficients(5, None, 0.7)).items():
        if key in average:
            torch.testing.assert_close(value, average[key], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_output_has_the_type_that_was_asked_for(dtype):
    models = save("a.safetensors", "b.safetensors")
    average_checkpoints(["a.safetensors", "b.safetensors"], "out.safetensors", dtype=dtype)
    check(safetensors.load_file("out.safetensors"), models, [0.5, 0.5], dtype)


def test_files_of_all_kinds_mix():
    models = save("a.safetensors", "b.pt", "c.bin")
    torch.save({"epoch": torch.tensor(3), "state_dict": models[1], "optimizer": {"lr": 0.1}}, "b.pt")
    torch.save(models[2], "c.bin", _use_new_zipfile_serialization=False)
    torch.save({**models[1], "version": 2}, "d.pth")
    done = average_checkpoints(["a.safetensors", "b.pt", "c.bin", "d.pth", models[0]], "out.safetensors")
    assert done.left_out == 1
    models = [*models, models[1], models[0]]
    check(safetensors.load_file("out.safetensors"), models, [1 / 5] * 5)


def test_strides_of_a_pt_file_do_not_matter():
    tensors = [{"w": torch.randn(6, 5, 4, 3).to(memory_format=torch.channels_last), "t": torch.randn(9, 7).T}]
    tensors.append({key: torch.randn_like(value) for key, value in tensors[0].items()})
    for name, part in zip("ab", tensors, strict=True):
        torch.save(part, f"{name}.pt")
    # 60 bytes of output at a time: pieces begin and end inside rows.
    average_checkpoints(["a.pt", "b.pt"], "out.safetensors", chunk_bytes=180)
    check(safetensors.load_file("out.safetensors"), tensors, [0.5, 0.5])


def test_a_file_whose_tensors_are_not_aligned_is_read():
    values = torch.randn(5)
    for padding in range(4):
        header = json.dumps({"w": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode() + b" " * padding
        blob = len(header).to_bytes(8, "little") + header + values.numpy().tobytes()
        Path(f"{padding}.safetensors").write_bytes(blob)
        average_checkpoints([f"{padding}.safetensors"] * 2, f"out{padding}.safetensors")
        assert torch.equal(safetensors.load_file(f"out{padding}.safetensors")["w"], values)


def test_the_bytes_depend_on_nothing_but_the_input(threads):
    save("a.safetensors", "b.pt", "c.safetensors")
    written = set()
    for number, chunk in ((1, 1), (2, 100), (2, 1 << 20)):
        threads(number)
        average_checkpoints(
            ["a.safetensors", "b.pt", "c.safetensors"], "o.safetensors", chunk_bytes=chunk, overwrite=True
        )
        written.add(Path("o.safetensors").read_bytes())
    assert len(written) == 1
    with safetensors.safe_open("o.safetensors", framework="pt") as file:
        third = 1 / 3
        assert json.loads(file.metadata()["average"]) == [
            ["a.safetensors", third],
            ["b.pt", third],
            ["c.safetensors", third],
        ]


def test_shards_go_in_and_come_out():
    models = save("a.safetensors", "b.safetensors")
    Path("big").mkdir()
    done = average_checkpoints(["a.safetensors"], "big", max_shard_size=200)
    assert done.files[-1] == Path("big/model.safetensors.index.json")
    assert sorted(map(str, done.files)) == sorted(map(str, Path("big").iterdir()))
    assert len(done.files) == 4 and done.files[0].name == "model-00001-of-00003.safetensors"
    index = json.loads(done.files[-1].read_text())
    whole = {}
    for name in sorted(set(index["weight_map"].values())):
        part = safetensors.load_file(Path("big") / name)
        assert {key for key, file in index["weight_map"].items() if file == name} == part.keys()
        # One tensor is larger than a shard may be.
        assert sum(t.nbytes for t in part.values()) <= 200 or len(part) == 1
        whole.update(part)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    check(whole, models[:1], [1])
    average_checkpoints(["big", "big/model.safetensors.index.json", "b.safetensors"], "out.safetensors")
    check(safetensors.load_file("out.safetensors"), [models[0], models[0], models[1]], [1 / 3] * 3)


def test_an_output_is_replaced_as_a_whole():
    save("a.safetensors", "b.safetensors")
    out = Path("out")
    out.mkdir()
    Path("out/model-2.safetensors").write_text("not ours")
    average_checkpoints(["a.safetensors"], out, max_shard_size=200)
    with pytest.raises(FileExistsError, match="the output exists already"):
        average_checkpoints(["b.safetensors"], out)
    average_checkpoints(["b.safetensors"], out, max_shard_size=300, overwrite=True)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    names = {*index["weight_map"].values(), "model.safetensors.index.json", "model-2.safetensors"}
    assert names == set(os.listdir(out))
    average_checkpoints(["b.safetensors"], out, overwrite=True)
    assert set(os.listdir(out)) == {"model.safetensors", "model-2.safetensors"}


def test_what_differs_is_shown_in_a_table():
    models = save("a.safetensors", "b.safetensors")
    models[1]["scale"] = torch.randn(1)  # would broadcast
    models[1]["conv.bias"] = models[1]["conv.bias"].float()
    models[1]["module.mask"] = models[1].pop("mask")
    safetensors.save_file(models[1], "b.safetensors")
    with pytest.raises(ValueError, match="do not fit together") as error:
        average_checkpoints(["a.safetensors", "a.safetensors", "b.safetensors"], "out.safetensors")
    assert str(error.value).splitlines() == [
        "the checkpoints do not fit together:",
        "tensor       in a.safetensors  in the other  the other",
        "conv.bias    float16 [8]       float32 [8]   b.safetensors",
        "mask         bool [5]          missing       b.safetensors",
        "module.mask  missing           bool [5]      b.safetensors",
        "scale        float32 []        float32 [1]   b.safetensors",
        "4 differences from a.safetensors",
    ]
    many = [{f"layer{i:02}": torch.zeros(n) for i in range(50)} for n in (2, 3)]
    with pytest.raises(ValueError, match="and 30 more\n50 differences from checkpoint 0") as error:
        average_checkpoints(many, "out.safetensors")
    assert len(str(error.value).splitlines()) == 24
    assert os.listdir() == ["a.safetensors", "b.safetensors"] or set(os.listdir()) == {"a.safetensors", "b.safetensors"}


def test_nan_and_inf_are_named_with_their_file():
    models = save("a.safetensors", "b.safetensors")
    models[1]["norm.weight"][3] = float("nan")
    models[1]["scale"].fill_(float("inf"))
    safetensors.save_file(models[1], "b.safetensors")
    with pytest.raises(ValueError, match=r"(norm\.weight|scale) holds a NaN or an inf in b\.safetensors$"):
        average_checkpoints(["a.safetensors", "b.safetensors"], "out.safetensors")
    assert sorted(os.listdir()) == ["a.safetensors", "b.safetensors"]
    done = average_checkpoints(["a.safetensors", "b.safetensors"], "out.safetensors", allow_nonfinite=True)
    assert sorted(done.nonfinite) == ["norm.weight", "scale"]
    assert safetensors.load_file("out.safetensors")["norm.weight"].isnan().sum() == 1
    huge = {"w": torch.full((3,), 6e4, dtype=torch.float16)}
    with (
        pytest.raises(ValueError, match="w: the average is beyond the range of float16"),
        pytest.warns(UserWarning, match="add up to 2"),
    ):
        average_checkpoints([huge, huge], "huge.safetensors", weights=[1, 1])


def test_what_is_no_checkpoint_is_refused():
    Path("x.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    torch.save({"f": torch.nn.Linear(1, 1), "w": torch.zeros(1)}, "code.pt")
    torch.save({"lr": 0.1}, "empty.pt")
    Path("m.index.json").write_text('{"weight_map": {"w": "../m.safetensors"}}')
    Path("folder").mkdir()
    safetensors.save_file({"v": torch.zeros(1)}, "v.safetensors")
    Path("v.index.json").write_text('{"weight_map": {"w": "v.safetensors"}}')
    for name, reason in {
        "x.safetensors": "x.safetensors: not a safetensors file",
        "code.pt": r"code.pt: not a checkpoint that can be read \(UnpicklingError",
        "empty.pt": "empty.pt: there are no tensors in it",
        "m.index.json": r"expected files beside the index, got \.\./m.safetensors",
        "v.index.json": "v.safetensors: w is not here, where the index of v.index.json says it is",
        "folder": "folder: there is no checkpoint in it",
    }.items():
        with pytest.raises(ValueError, match=reason):
            average_checkpoints([name], "out.safetensors")
    with pytest.raises(ValueError, match="w is complex64 and cannot be averaged"):
        torch.save({"w": torch.zeros(2, dtype=torch.complex64)}, "c.pt")
        average_checkpoints(["c.pt"], "out.safetensors")
    with pytest.raises(FileNotFoundError):
        average_checkpoints(["none.safetensors"], "out.safetensors")
    with pytest.raises(ValueError, match=r"expected a name ending in \.safetensors"):
        average_checkpoints(["v.safetensors"], "out.pt")
    for how, reason in (
        ({"weights": [1.0]}, "weights must be 2 finite numbers"),
        ({"weights": [float("nan"), 1.0]}, "weights must be 2 finite numbers"),
        ({"ema": 1.5}, r"ema must be a decay in \[0, 1\], got 1.5"),
        ({"ema": 0.5, "weights": [0.5, 0.5]}, "exclude each other"),
        ({"dtype": torch.int8}, "dtype must be one of float64"),
    ):
        with pytest.raises(ValueError, match=reason):
            average_checkpoints(["v.safetensors", "v.safetensors"], "out.safetensors", **how)
    assert not [name for name in os.listdir() if "out" in name]


def test_a_file_that_changes_meanwhile_is_noticed(monkeypatch):
    save("a.safetensors", "b.safetensors")

    def then_change(*arguments):
        write(*arguments)
        os.utime("b.safetensors")

    write = soups._write
    monkeypatch.setattr(soups, "_write", then_change)
    with pytest.raises(RuntimeError, match=r"b\.safetensors was changed while it was read"):
        average_checkpoints(["a.safetensors", "b.safetensors"], "out.safetensors")
    assert sorted(os.listdir()) == ["a.safetensors", "b.safetensors"]


def test_a_pt_file_that_torch_cannot_map_says_what_to_do(monkeypatch, capsys):
    save("a.pt")

    def load(*arguments, **options):
        raise RuntimeError("unable to mmap 64424509440 bytes from file <a.pt>: Cannot allocate memory (12)")

    monkeypatch.setattr(torch, "load", load)
    assert cli.main(["average", "a.pt", "-o", "out.safetensors"]) == cli.FAILED
    assert "error: a.pt: torch cannot map it; a safetensors file has no such limit" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch):
    save("a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"pip install 'fastnuggets\[average\]'"):
        average_checkpoints(["a.safetensors"], "out.safetensors")


# Prints by how many MiB the largest resident memory of the process grew, mapped files included.
PEAK = """
import re, sys
import torch
import safetensors.torch
from fastnuggets.training import soup as soups

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])

soups._REOPEN = 4 << 20  # 128 MiB are more than these files have
soups.average_checkpoints([{"warm": torch.zeros(1)}], "warm.safetensors", overwrite=True)
how, *names = sys.argv[1:]
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
if how == "load":
    [tensor.sum() for name in names for tensor in safetensors.torch.load_file(name).values()]
else:
    soups.average_checkpoints(names, "out.safetensors", chunk_bytes=4 << 20, overwrite=True)
print((status("VmHWM") - before) >> 10)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory as Linux counts it")
def test_memory_is_bounded_by_the_chunk_and_not_by_the_model():
    # 64 MiB, 60 of them in one tensor.
    tensors = {"big": torch.randn(15 << 20), **{f"small{i}": torch.randn(1 << 16) for i in range(16)}}
    safetensors.save_file(tensors, "a.safetensors")
    torch.save(tensors, "b.pt")

    def peak(*arguments: str) -> int:
        command = [sys.executable, "-c", PEAK, *arguments]
        return int(subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True).stdout)

    assert peak("load", "a.safetensors") >= 60  # the measurement sees a model that is in memory
    # Measured: 13 for files of 16, 64 and 200 MiB alike, 10 for 4 MiB.
    assert peak("soup", "a.safetensors", "a.safetensors", "b.pt") <= 24


# The command, which at the nth call of a function gets a signal, or may not write beyond some bytes.
STOPPED = """
import os, resource, sys
from fastnuggets import cli
from fastnuggets.training import soup as soups
what, count, *arguments = sys.argv[1:]
left = int(count)
def stopping(call, number):
    def then(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
        return call(*arguments, **options)
    return then
if what == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
elif what == "rename":
    os.replace = stopping(os.replace, 9)
else:
    soups._sum = stopping(soups._sum, int(what))
soups._CHUNK = 300
soups.average_checkpoints.__kwdefaults__["chunk_bytes"] = 300
sys.exit(cli.main(["average", *arguments]))
"""


def stopped(what: object, count: int, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", STOPPED, str(what), str(count), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def outputs() -> "dict[str, bytes]":
    return {path.name: path.read_bytes() for path in Path().iterdir() if "out" in path.name}


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_kill_leaves_no_output_and_a_rerun_gives_the_same_bytes():
    save("a.safetensors", "b.pt")
    command = ("a.safetensors", "b.pt", "-o", "out.safetensors", "--max-shard-size", "300")
    assert cli.main(["average", *command]) == cli.OK
    whole = outputs()
    for path in whole:
        Path(path).unlink()
    for what, count in ((9, 5), ("rename", 2), ("rename", len(whole))):
        assert stopped(what, count, *command).returncode == -signal.SIGKILL
        assert "out.safetensors.index.json" not in outputs()
        # What has its final name is complete, and the rest is kept under another.
        assert len(outputs()) >= count - 1 if what == "rename" else not [n for n in outputs() if n[0] != "."]
        assert all(whole[name] == blob for name, blob in outputs().items() if name[0] != ".")
        assert any(name.endswith(".partial") for name in outputs())
    assert cli.main(["average", *command]) == cli.OK
    assert outputs() == whole


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_and_a_full_disk_are_one_clear_line_and_leave_nothing():
    save("a.safetensors", "b.pt")
    command = ("a.safetensors", "b.pt", "-o", "out.safetensors")
    for what, count, code, line in (
        (int(signal.SIGINT), 3, cli.INTERRUPTED, "fastnuggets: interrupted\n"),
        ("full", 1000, cli.FAILED, "fastnuggets: error: the disk is full\n"),
    ):
        ended = stopped(what, count, *command)
        assert ended.returncode == code
        assert ended.stderr.endswith(line)
        assert "Traceback" not in ended.stderr
        assert outputs() == {}


def test_no_disk_is_filled_that_is_too_small_anyway(monkeypatch, capsys):
    save("a.safetensors")
    monkeypatch.setattr(soups.shutil, "disk_usage", lambda path: type("usage", (), {"free": 100}))
    assert cli.main(["average", "a.safetensors", "-o", "out.safetensors"]) == cli.FAILED
    assert capsys.readouterr().err.endswith("fastnuggets: error: the disk is full: .\n")
    assert outputs() == {}


def test_the_command_says_what_it_did(capsys):
    models = save("a.safetensors", "b.pt", "c.safetensors")
    torch.save({**models[1], "epoch": 3}, "b.pt")
    names = ["a.safetensors", "b.pt", "c.safetensors"]
    command = ["average", *names, "-o", "out.safetensors", "--dtype", "bfloat16", "--weights", "0.5", "0.25", "0.5"]
    assert cli.main(command) == cli.OK
    said = capsys.readouterr()
    assert said.out == "out.safetensors: 9 tensors, the average of 3 checkpoints\n"
    assert said.err.splitlines()[-3:] == [
        "fastnuggets: warning: the weights add up to 1.25, not to 1, and are used as given",
        "fastnuggets: integer tensors taken from c.safetensors: 2",
        "fastnuggets: entries left out that are no tensors: 1",
    ]
    check(safetensors.load_file("out.safetensors"), models, [0.5, 0.25, 0.5], torch.bfloat16)
    assert cli.main(["average", *names, "-o", "out.safetensors", "--ema", "0.9"]) == cli.FAILED
    assert "error: the output exists already: out.safetensors" in capsys.readouterr().err
    assert cli.main(["average", *names, "-o", "ema.safetensors", "--ema", "0.9", "--max-shard-size", "0.2kB"]) == cli.OK
    assert capsys.readouterr().out.startswith("ema.safetensors.index.json: 9 tensors in 3 shards, the average of 3")
    models[0]["scale"].fill_(float("nan"))
    safetensors.save_file(models[0], "nan.safetensors")
    assert cli.main(["average", "nan.safetensors", "-o", "nan-out.safetensors"]) == cli.FAILED
    assert capsys.readouterr().err.endswith("error: scale holds a NaN or an inf in nan.safetensors\n")
    assert cli.main(["average", "nan.safetensors", "-o", "nan-out.safetensors", "--allow-nonfinite"]) == cli.OK
    assert capsys.readouterr().err.endswith("fastnuggets: tensors with NaN or inf: scale\n")


@pytest.mark.parametrize(
    "wrong",
    [
        ["--weights", "1"],
        ["--ema", "1.1"],
        ["--ema", "0.9", "--weights", "0.5", "0.5"],
        ["--max-shard-size", "5XB"],
        ["--max-shard-size", "-5"],
        ["--dtype", "int8"],
    ],
)
def test_a_wrong_command_line_ends_with_2(wrong, capsys):
    try:
        code = cli.main(["average", "a.safetensors", "b.safetensors", "-o", "out.safetensors", *wrong])
    except SystemExit as end:
        code = end.code
    assert code == cli.USAGE
    assert "error:" in capsys.readouterr().err


def test_sizes_have_units():
    sizes = {"5GB": 5 * 10**9, "1.5 MiB": 3 << 19, "7": 7, "7B": 7, "2k": 2000, ".5KiB": 512, "1TB": 10**12}
    assert {text: arguments.size(text) for text in sizes} == sizes


def distance(target):
    return lambda found: -float((found["w"].double() - target).abs().max())


def test_the_greedy_soup_keeps_what_does_not_lower_the_score():
    # Alone, 1 is best (0.9 from 0), then 0, 3, 2. 1 and 0 make 0.05; 3 makes it worse; 2 too.
    values = [-1.0, 0.9, 4.0, 2.0]
    checkpoints = [{"w": torch.full((3,), v, dtype=torch.bfloat16), "n": torch.tensor(i)} for i, v in enumerate(values)]
    seen = []

    def score(found):
        seen.append(found["w"][0].item())
        return distance(0)(found)

    found = greedy_soup(checkpoints, score)
    assert found.members == [1, 0]
    assert found.scores == [-1.0, -0.8984375, -4.0, -2.0]
    assert found.score == -abs(seen[4]) and len(seen) == 7
    assert torch.equal(found.weights["w"], checkpoints[0]["w"].lerp(checkpoints[1]["w"], 0.5))
    assert found.weights["n"] == 0
    # A score that stays is kept; known scores are not computed again.
    seen.clear()
    same = greedy_soup(checkpoints[:1] * 3, score, scores=[0.5, 0.5, 0.5])
    assert same.members == [0] and seen == [-1.0, -1.0]
    assert greedy_soup(checkpoints[:1] * 3, score).members == [0, 1, 2]
    worst = greedy_soup(checkpoints, lambda found: float("nan") if found["w"][0] < 0 else distance(0)(found))
    assert worst.members == [1]
    with pytest.raises(ValueError, match="the score of every checkpoint is NaN"):
        greedy_soup(checkpoints, lambda found: float("nan"))


def test_the_running_sum_of_a_greedy_soup_is_the_mean_of_its_members():
    target = torch.randn(50, dtype=torch.float64)
    checkpoints = [{"w": (target + torch.randn(50)).to(torch.float32)} for _ in range(12)]
    found = greedy_soup(checkpoints, lambda found: -float((found["w"] - target).square().mean()))
    assert len(found.members) > 4
    mean = torch.stack([checkpoints[i]["w"].double() for i in found.members]).mean(0)
    assert (found.weights["w"] - mean).abs().max() < 1e-6


def test_an_interrupted_greedy_soup_goes_on_with_the_same_bits():
    names = [f"{i}.safetensors" for i in range(5)]
    save(*names)
    target = torch.zeros(7)
    calls = []

    def score(found):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return -float((found["norm.weight"] - target).square().mean())

    with pytest.raises(KeyboardInterrupt):
        greedy_soup(names, score, state="soup.json")
    resumed = greedy_soup(names, score, state="soup.json")
    assert len(calls) == 10  # 9 scores, one of them asked for twice
    whole = greedy_soup(names, lambda found: -float((found["norm.weight"] - target).square().mean()))
    assert resumed[1:] == whole[1:]
    assert all(torch.equal(resumed.weights[key], whole.weights[key]) for key in whole.weights)
    with pytest.raises(ValueError, match=r"soup\.json: a soup of other checkpoints"):
        greedy_soup(names[1:], score, state="soup.json")
    Path("soup.json").write_text("[]")
    with pytest.raises(ValueError, match=r"soup\.json: not a state of greedy_soup"):
        greedy_soup(names, score, state="soup.json")
