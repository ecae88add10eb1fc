"""`fastnuggets compose` and `blend`: what they write, what they say, and what survives a kill or a full disk."""

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

cv2 = pytest.importorskip("cv2")
pytest.importorskip("PIL.Image")
coco = pytest.importorskip("pycocotools.coco")

from fastnuggets import cli, scenes  # noqa: E402
from fastnuggets.scenes import coco as writing  # noqa: E402
from fastnuggets.scenes import images  # noqa: E402

INPUT = ("--objects", "objects", "--backgrounds", "rooms")
SMALL = ("--size", "48,64", "--count", "1,3", "--blend", "none,gaussian")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder of cut-outs, one in ten of them broken, and one of backgrounds."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for n in range(20):
        pixels = rng.integers(0, 256, (24, 24, 4), dtype=np.uint8)
        pixels[..., 3] = 255 * (np.hypot(*(np.mgrid[:24, :24] - 11.5)) < 12 - n % 4)
        path = Path("objects", "cup" if n % 2 else "box", f"{n:02d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), pixels)
        if n % 10 == 4:
            path.write_bytes(path.read_bytes()[:200])
    Path("rooms").mkdir()
    for n in range(3):
        cv2.imwrite(f"rooms/{n}.png", np.full((60, 90, 3), 60 * n + 40, np.uint8))
    Path("rooms/3.png").write_bytes(b"broken")


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments)])


def compose(*arguments: object, out: str = "out", count: int = 12) -> int:
    return run("compose", *INPUT, *SMALL, "--out", out, "--images", count, "--workers", 0, *arguments)


def digest(folder: str) -> str:
    """Of the names and bytes of all files."""
    found = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        found.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return found.hexdigest()


def read(folder: str) -> "coco.COCO":
    with contextlib.redirect_stdout(io.StringIO()):
        return coco.COCO(f"{folder}/annotations.json")


def test_a_coco_data_set_comes_out(capsys):
    assert compose("--format", "png") == cli.OK
    said = capsys.readouterr()
    broken = ["box/04.png", "box/14.png", "3.png"]
    assert said.out.startswith("out: 12 images with ")
    assert said.out.endswith("broken files skipped (named in out.skipped.tsv)\n")
    reported = dict(line.split("\t") for line in Path("out.skipped.tsv").read_text().splitlines())
    assert reported
    assert set(reported) <= set(broken)
    assert all(f"skipped {name}: {reason}" in said.err for name, reason in reported.items())
    assert sorted(os.listdir("out")) == ["annotations.json", "images"]
    assert len(os.listdir("out/images")) == 12
    found = read("out")
    assert [one["name"] for one in found.loadCats(found.getCatIds())] == ["box", "cup"]
    composer = scenes.SceneComposer(
        scenes.Cutouts.from_folder("objects"),
        scenes.Backgrounds.from_folder("rooms"),
        scenes.preset("default", size=(48, 64), objects=(1, 3), blend=("none", "gaussian")),
    )
    for image in found.loadImgs(found.getImgIds()):
        scene = composer.scene(image["scene"])
        assert np.array_equal(images.read_rgb(Path("out/images", image["file_name"])), scene.image)
        assert (image["width"], image["height"], image["blend"]) == (64, 48, next(iter(scene.images)))
        annotations = found.loadAnns(found.getAnnIds(imgIds=[image["id"]]))
        assert len(annotations) == len(scene.labels.instances)
        for one, instance in zip(annotations, scene.labels.instances, strict=True):
            mask = found.annToMask(one) > 0
            assert np.array_equal(mask, scene.labels.mask(instance))
            assert one["area"] == mask.sum()
            assert one["bbox"] == list(instance.box)
            assert found.cats[one["category_id"]]["name"] == instance.category
            assert one["source"] == instance.name
    assert len({one["id"] for one in found.anns.values()}) == len(found.anns)


def test_all_blends_share_one_annotation(capsys):
    assert compose("--blend", "none,gaussian,box", "--same-scene", count=4) == cli.OK
    found = read("out")
    assert len(os.listdir("out/images")) == len(found.imgs) == 12
    assert sorted(os.listdir("out/images"))[:3] == ["000000_box.jpg", "000000_gaussian.jpg", "000000_none.jpg"]
    by_scene: dict[int, set[str]] = {}
    for image in found.imgs.values():
        own = found.loadAnns(found.getAnnIds(imgIds=[image["id"]]))
        kept = json.dumps([{k: v for k, v in one.items() if k not in ("id", "image_id")} for one in own])
        by_scene.setdefault(image["scene"], set()).add(kept)
    assert [len(kept) for kept in by_scene.values()] == [1] * 4


def test_the_same_command_gives_the_same_bytes_and_another_seed_others():
    assert compose() == compose(out="again") == compose("--seed", 1, out="other") == cli.OK
    assert digest("out") == digest("again")
    assert digest("out") != digest("other")
    assert compose(count=4, out="four") == cli.OK
    for path in Path("four/images").iterdir():
        assert path.read_bytes() == Path("out/images", path.name).read_bytes()


def test_what_is_done_is_not_made_again(monkeypatch, capsys):
    assert compose(out="whole") == cli.OK
    made = []
    write = writing.CocoWriter.append

    def fail(self, record):
        write(self, record)
        made.append(record["scene"])
        if len(made) in (5, 8):
            raise OSError(28, "No space left on device", "x.jpg")

    monkeypatch.setattr(writing.CocoWriter, "append", fail)
    assert compose() == cli.FAILED
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "fastnuggets: error: the disk is full: x.jpg"
    assert said[-2].endswith("5 finished scenes kept in out.partial; the same command goes on from there")
    # Of one finished scene the image is damaged, and a line is cut off as a crash would.
    next(Path("out.partial/images").glob("000001*")).write_bytes(b"")
    with open("out.partial/records.jsonl", "ab") as file:
        file.write(b'{"scene": 9, "fil')
    Path("out.partial/images/.000003.jpg.tmp").write_bytes(b"half")
    assert compose() == cli.FAILED
    assert "going on from out.partial: 4 scenes are done" in capsys.readouterr().err
    assert compose() == cli.OK
    assert "going on from out.partial: 7 scenes are done" in capsys.readouterr().err
    assert sorted(made) == sorted([*range(12), 1])
    assert digest("out") == digest("whole")
    assert not Path("out.partial").exists()


def test_other_settings_do_not_go_on(monkeypatch, capsys):
    def fail(self, record):
        append(self, record)
        raise KeyboardInterrupt

    append = writing.CocoWriter.append
    with monkeypatch.context() as patch:
        patch.setattr(writing.CocoWriter, "append", fail)
        assert compose() == cli.INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1] == "fastnuggets: interrupted"
    assert compose("--seed", 3) == cli.FAILED
    error = capsys.readouterr().err
    assert "out.partial was begun with other settings (seed was 0 and is 3); finish or restart it" in error
    Path("objects/cup/new.png").write_bytes(Path("objects/cup/01.png").read_bytes())
    assert compose() == cli.FAILED
    assert "cutouts was" in capsys.readouterr().err
    os.rename("objects/cup/new.png", "objects/cup/renamed.png")
    Path("objects/cup/11.png").unlink()
    assert compose() == cli.FAILED
    assert "cutouts was" in capsys.readouterr().err
    os.rename("objects/cup/renamed.png", "objects/cup/11.png")
    Path("rooms/0.png").write_bytes(Path("rooms/3.png").read_bytes())
    assert compose() == cli.FAILED
    assert "backgrounds was" in capsys.readouterr().err
    assert compose("--seed", 3, "--restart") == cli.OK
    assert compose("--seed", 3) == cli.FAILED
    assert "the output exists already: out" in capsys.readouterr().err
    assert compose("--seed", 4, "--overwrite", count=3) == cli.OK
    assert len(os.listdir("out/images")) == 3


def test_without_a_finished_scene_nothing_is_left(capsys):
    for path in Path("rooms").iterdir():
        path.write_bytes(b"broken")
    assert compose() == cli.FAILED
    assert "64 files in a row cannot be used" in capsys.readouterr().err
    assert not Path("out.partial").exists()
    Path("out.partial").mkdir()
    assert compose() == cli.FAILED
    assert "not known to be unfinished work" in capsys.readouterr().err


def test_distractors_annotated_backgrounds_and_strict(capsys):
    assert compose("--preset", "simple_copy_paste", out="first", count=6) == cli.OK
    more = ("--distractors", "objects/box", "--distractor-count", "1,1", "--background-annotations")
    arguments = ["--objects", "objects/cup", "--backgrounds", "first/images", *SMALL, "--images", 4, "--workers", 0]
    arguments += [*more, "first/annotations.json", "--strict"]
    assert run("compose", *arguments, "--out", "second") in (cli.OK, cli.SKIPPED)
    found = read("second")
    names = {one["name"] for one in found.cats.values()}
    assert names == {"box", "cup", "object"}, "of the backgrounds, and of what lies in no folder"
    assert any("#" in one["source"] for one in found.anns.values())
    assert run("compose", *INPUT, "--out", "x", "--distractor-count", "1,1") == cli.USAGE
    assert run("compose", *INPUT, "--out", "x", "--blend", "magic") == cli.USAGE
    assert run("compose", *INPUT, "--out", "x", "--preset", "magic") == cli.USAGE
    assert run("compose", "--objects", "nowhere", "--backgrounds", "rooms", "--out", "x") == cli.FAILED
    assert "expected a folder: nowhere" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit) as end:
        run("compose", *INPUT, "--out", "x", "--images", "0")
    assert end.value.code == cli.USAGE
    assert compose("--strict", out="strict") == cli.SKIPPED


def survivors(mark: str) -> list[str]:
    """Processes that carry the mark of this test."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"FASTNUGGETS_TEST={mark}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_a_kill_in_the_middle_costs_nothing_finished(way):
    count = 150
    command = ["compose", *INPUT, *SMALL, "--out", "out", "--images", str(count)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "FASTNUGGETS_TEST": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, "-m", "fastnuggets.cli", *command, "--workers", "2"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    records = Path("out.partial/records.jsonl")
    deadline = time.monotonic() + 60
    while not (records.exists() and records.read_bytes().count(b"\n") >= 10):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)
    if way == signal.SIGKILL:
        process.kill()
    else:
        os.killpg(process.pid, way)
    said = process.communicate(timeout=60)[1]
    deadline = time.monotonic() + 20
    while survivors(os.getcwd()):
        assert time.monotonic() < deadline, survivors(os.getcwd())
        time.sleep(0.02)
    if way == signal.SIGINT:
        assert process.returncode == cli.INTERRUPTED
        assert said.splitlines()[-1] == "fastnuggets: interrupted"
        assert "Traceback" not in said
    finished = {path.name: path.stat().st_mtime_ns for path in Path("out.partial/images").glob("[0-9]*")}
    done = records.read_bytes().count(b"\n")
    assert 10 <= done < count
    assert compose(count=count) == cli.OK
    kept = [Path("out/images", name).stat().st_mtime_ns == time for name, time in finished.items()]
    assert sum(kept) >= done, "what was done was not made again"
    assert compose(count=count, out="whole") == cli.OK
    assert digest("out") == digest("whole")


FULL_DISK = """
import resource, sys
from fastnuggets import cli
import cv2, pycocotools.mask, fastnuggets.scenes
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_is_one_clear_line():
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    cv2.imwrite("rooms/2.png", noise)  # 9 kB as png; scenes on the plain ones come to 4
    make = scenes.SceneComposer(
        scenes.Cutouts.from_folder("objects"),
        scenes.Backgrounds.from_folder("rooms"),
        scenes.preset("default", size=(48, 64), objects=(1, 1), blend=("none", "gaussian")),
    )
    while [make.scene(k).background_name == "2.png" for k in range(2)] != [False, True]:
        make.seed += 1
    command = ["compose", *INPUT, *SMALL, "--out", "out", "--images", "12", "--workers", "0", "--format", "png"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *command, "--count", "1,1", "--seed", str(make.seed)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert ended.returncode == cli.FAILED
    kept, error = ended.stderr.splitlines()[-2:]
    assert kept.startswith("fastnuggets: 1 finished scene kept in out.partial")
    assert error == "fastnuggets: error: the disk is full: out.partial/images/000001.png"
    assert "Traceback" not in ended.stderr
    assert not Path("out").exists()
    assert not list(Path("out.partial").rglob("*.tmp"))


@pytest.mark.parametrize(
    "mode", ["none", "gaussian", "box", "difference", "poisson", "mixed", "rectangle", "multiband"]
)
def test_blend_pastes_one_image_onto_another(mode, capsys):
    cv2.imwrite("fg.png", np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:25] = 255
    cv2.imwrite("mask.png", mask)
    assert run("blend", "fg.png", "mask.png", "rooms/1.png", "-o", "out.png", "--mode", mode) == cli.OK
    assert capsys.readouterr().out == f"out.png: 90 x 60, {mode}\n"
    before, after = images.read_rgb(Path("rooms/1.png")), images.read_rgb(Path("out.png"))
    assert (after[25:35, 35:55] != before[25:35, 35:55]).any()
    if mode != "multiband":
        assert np.array_equal(after[:18], before[:18])
    at = ("--at=-8,70",)
    assert run("blend", "fg.png", "mask.png", "rooms/1.png", "-o", "out.jpg", "--mode", mode, *at) == cli.OK


def test_help_names_all_presets_and_blends(capsys):
    with pytest.raises(SystemExit):
        run("compose", "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert f"settings to begin with, of {', '.join(scenes.PRESETS)}" in text.replace("- ", "-")
    assert f"of {', '.join(scenes.recipes.BLENDS)};" in text
    for mode in ("poisson", "multiband"):
        assert mode in cli._BLENDS


def test_blend_says_what_is_wrong(capsys):
    cv2.imwrite("fg.png", np.zeros((20, 30, 3), np.uint8))
    cv2.imwrite("mask.png", np.zeros((20, 31), np.uint8))
    assert run("blend", "fg.png", "mask.png", "rooms/1.png", "-o", "out.png") == cli.FAILED
    assert "the mask is (20, 31), and the foreground (20, 30)" in capsys.readouterr().err
    assert run("blend", "fg.png", "mask.png", "rooms/3.png", "-o", "out.png") == cli.FAILED
    assert "rooms/3.png: " in capsys.readouterr().err
    assert run("blend", "fg.png", "mask.png", "rooms/1.png", "-o", "out.gif") == cli.USAGE
    assert not list(Path().glob("*out.*"))
