"""Cut-outs, scenes and their labels, the data set of a loader, and pasting into batches."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2")
coco_masks = pytest.importorskip("pycocotools.mask")
Image = pytest.importorskip("PIL.Image")

from fastnuggets import nn, ops, scenes  # noqa: E402
from fastnuggets.scenes import blending, cutouts, images, synthtext  # noqa: E402
from fastnuggets.scenes.labels import Placed, clipped, make_labels, paint  # noqa: E402
from fastnuggets.scenes.recipes import Recipe  # noqa: E402

SIZE = (96, 128)
SMALL = Recipe(size=SIZE, objects=(3, 6), scale=(0.3, 0.8), scale_of="canvas", flip=0.5, blend=("none",))


def disc(side: int, soft: bool = False) -> np.ndarray:
    y, x = np.mgrid[:side, :side] - (side - 1) / 2
    distance = side / 2 - np.hypot(y, x)
    return np.clip(255 * distance if soft else 255.0 * (distance > 0), 0, 255).astype(np.uint8)


def ring(side: int) -> np.ndarray:
    inner = np.zeros((side, side), np.uint8)
    inner[side // 4 : side - side // 4, side // 4 : side - side // 4] = 255
    return disc(side) & ~inner


@pytest.fixture(scope="module")
def pieces() -> list[scenes.Cutout]:
    """Noise in several shapes: no pixel is like the background by chance alone."""
    rng = np.random.default_rng(0)
    masks = [disc(40), ring(60), np.full((20, 70), 255, np.uint8), disc(50, soft=True)]
    made = []
    for n, mask in enumerate(masks):
        y, x, h, w = cutouts.bounding_box(mask >= 128)
        mask = mask[y : y + h, x : x + w]
        pixels = rng.integers(0, 256, (*mask.shape, 3), dtype=np.uint8)
        made.append(scenes.Cutout(pixels, mask, "round" if n in (0, 1, 3) else "long", f"piece {n}"))
    return made


@pytest.fixture(scope="module")
def rooms() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = [(120, 140), (96, 128), (200, 300), (50, 40)]
    return [cv2.GaussianBlur(rng.integers(0, 256, (*shape, 3), dtype=np.uint8), (9, 9), 2) for shape in shapes]


def composer(pieces, rooms, recipe=SMALL, **options):
    return scenes.SceneComposer(pieces, rooms, recipe, **{"seed": 5, **options})


# ---- cut-outs


def save(path: Path, array: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def solid(h: int, w: int, colour=(200, 100, 50)) -> np.ndarray:
    return np.full((h, w, 3), colour, np.uint8)


def test_rgba_files_are_cropped_and_named_by_their_folder(tmp_path):
    alpha = np.zeros((30, 40), np.uint8)
    alpha[5:20, 8:30] = 255
    alpha[5:7, 8:10] = 0  # a corner that nobody sees, black in the file
    pixels = np.where(alpha[..., None] > 0, solid(30, 40), 0).astype(np.uint8)
    save(tmp_path / "cup" / "a" / "one.png", np.dstack([pixels, alpha]))
    save(tmp_path / "two.png", np.dstack([pixels, alpha]))
    (tmp_path / ".hidden.png").write_bytes(b"")
    found = scenes.Cutouts.from_folder(tmp_path)
    assert [(one.category, one.name) for one in found] == [("cup", "cup/a/one.png"), ("object", "two.png")]
    assert found.categories == ("cup", "object")
    one = found[0]
    assert one.image.shape == (15, 22, 3)
    assert np.array_equal(one.mask, alpha[5:20, 8:30])
    assert (one.image == solid(15, 22)).all(), "what is hidden takes the colour beside it"
    assert found[0] is one, "kept in memory"
    assert found.only(["cup"]).categories == ("cup",)
    with pytest.raises(ValueError, match="no category 'x'"):
        found.only(["x"])


def test_photographs_with_masks_beside_them(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[4:16, 6:26] = 255
    for name, inverted in (("plain", False), ("inverted", True)):
        folder = tmp_path / name
        shown = 255 - mask if inverted else mask
        save(folder / "x" / "a.jpg", solid(20, 30), quality=95)
        Image.fromarray(shown).convert("1").save(folder / "x" / "a.pbm")
        save(folder / "x" / "b.png", solid(20, 30))
        save(folder / "x" / "b_mask.png", shown)
        save(folder / "y" / "c.png", solid(20, 30))
        save(folder / "y" / "c_mask.png", shown[:-1])
        save(folder / "y" / "d.png", solid(20, 30))
        found = scenes.Cutouts.from_folder(folder, inverted=inverted)
        assert len(found) == 4
        assert found[0].mask.shape == found[1].mask.shape == (12, 20)
        assert found[0].mask.min() == 255
        assert found.check() == {
            "y/c.png": "the mask is 30 x 19 and the image 30 x 20",
            "y/d.png": "it has neither an alpha channel nor a mask beside it",
        }


def test_every_kind_of_file_is_read_as_eight_bits(tmp_path):
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    assert np.array_equal(images.read_rgb(tmp_path / "deep.png")[..., 1], np.arange(256).reshape(16, 16))
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    save(tmp_path / "grey.png", np.dstack([grey, 255 - grey]))
    assert np.array_equal(np.array(images.open_image(tmp_path / "grey.png"))[..., 3], 255 - grey)
    palette = Image.fromarray(np.where(grey > 30, 7, 2).astype(np.uint8)).convert("P")
    palette.save(tmp_path / "palette.png", transparency=2)
    assert np.array_equal(np.array(images.open_image(tmp_path / "palette.png"))[..., 3] > 0, grey > 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = np.zeros((20, 40, 3), np.uint8)
    turned[:, :20] = 255
    Image.fromarray(turned).save(tmp_path / "turned.png", exif=exif)
    upright = images.read_rgb(tmp_path / "turned.png")
    assert upright.shape == (40, 20, 3)
    assert upright[:20].min() == 255
    assert upright[20:].max() == 0
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(scenes.BrokenFileError, match="floating-point"):
        images.read_rgb(tmp_path / "float.tif")
    save(tmp_path / "ones.png", (grey > 30).astype(np.uint8))
    assert set(np.unique(images.read_mask(tmp_path / "ones.png"))) == {0, 255}


def test_broken_files_are_named_with_the_reason(tmp_path):
    alpha = np.full((20, 20), 255, np.uint8)
    save(tmp_path / "a.png", np.dstack([solid(20, 20), alpha]))
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_text("no image")
    save(tmp_path / "d.png", np.dstack([solid(20, 20), 0 * alpha]))
    save(tmp_path / "e.png", np.dstack([solid(5, 20), alpha[:5]]))
    (tmp_path / "f.png").symlink_to(tmp_path / "nowhere.png")
    found = scenes.Cutouts.from_folder(tmp_path)
    reasons = found.check()
    assert list(reasons) == ["b.png", "c.png", "d.png", "e.png", "f.png"]
    assert reasons["d.png"] == "its mask is empty"
    assert reasons["e.png"] == "the object is 20 x 5, smaller than 6"
    assert reasons["f.png"] == "No such file or directory"
    assert all(reasons.values())
    with pytest.raises(scenes.BrokenFileError, match=r"^d\.png: its mask is empty$") as told:
        found[3]
    assert pickle.loads(pickle.dumps(told.value)).reason == "its mask is empty"
    with pytest.raises(ValueError, match="no image"):
        scenes.Cutouts.from_folder(tmp_path / "a", masks="alpha") if (tmp_path / "a").mkdir() is None else None
    with pytest.raises(NotADirectoryError):
        scenes.Cutouts.from_folder(tmp_path / "b")


def test_coco_and_voc_annotations(tmp_path):
    save(tmp_path / "JPEGImages" / "a.jpg", solid(40, 60), quality=95)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:50] = 1
    run = coco_masks.encode(np.asfortranarray(mask))
    found = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "categories": [{"id": 3, "name": "cup"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "segmentation": [[20, 10, 50, 10, 50, 30, 20, 30]]},
            {"id": 2, "image_id": 7, "category_id": 3, "segmentation": {**run, "counts": run["counts"].decode()}},
            {"id": 3, "image_id": 7, "category_id": 3, "iscrowd": 1, "segmentation": {"size": [1, 1], "counts": [1]}},
            {"id": 4, "image_id": 7, "category_id": 3, "segmentation": [[1, 2]]},
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(found))
    read = scenes.Cutouts.from_coco(tmp_path / "JPEGImages", tmp_path / "coco.json")
    assert [one.mask.shape for one in (read[0], read[1])] == [(20, 30)] * 2
    assert read[0].mask.min() == 255
    assert (read[1].category, read[1].name) == ("cup", "a.jpg#2")
    assert list(read.check()) == ["a.jpg#4"]
    (tmp_path / "Annotations").mkdir()
    box = "<bndbox><xmin>21</xmin><ymin>11</ymin><xmax>50</xmax><ymax>30</ymax></bndbox>"
    text = f"<annotation><filename>a.jpg</filename><object><name>dog</name>{box}</object></annotation>"
    (tmp_path / "Annotations" / "a.xml").write_text(text)
    (tmp_path / "Annotations" / "b.xml").write_text("<broken")
    voc = scenes.Cutouts.from_voc(tmp_path)
    assert voc[0].mask.shape == (20, 30), "the whole box without a segmentation"
    assert list(voc.skipped) == [str(tmp_path / "Annotations" / "b.xml")]
    (tmp_path / "SegmentationObject").mkdir()
    Image.fromarray(mask * 1).convert("P").save(tmp_path / "SegmentationObject" / "a.png")
    assert cutouts.Cutouts.from_voc(tmp_path)[0].category == "dog"


def test_grabcut_finds_an_object_on_a_plain_background(tmp_path):
    rng = np.random.default_rng(0)
    photo = np.clip(rng.normal(225, 3, (300, 400, 3)), 0, 255)
    truth = np.zeros((300, 400), bool)
    truth[80:240, 120:300] = disc(180)[10:170] > 0
    photo[truth] = np.clip(rng.normal((60, 110, 70), 20, (int(truth.sum()), 3)), 0, 255)
    save(tmp_path / "mug.jpg", photo.astype(np.uint8), quality=95)
    found = cutouts.grabcut(images.read_rgb(tmp_path / "mug.jpg")) > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.97
    assert scenes.Cutouts.from_folder(tmp_path, masks="grabcut")[0].category == "object"
    assert not cutouts.grabcut(solid(50, 50)).any()


def test_cutouts_can_be_pickled_without_what_they_hold(tmp_path):
    save(tmp_path / "a.png", np.dstack([solid(200, 200), disc(200)]))
    found = scenes.Cutouts.from_folder(tmp_path, cache_bytes=1000)
    assert found[0] is not found[0], "larger than the cache"
    large = scenes.Cutouts.from_folder(tmp_path)
    assert large[0] is large[0]
    assert len(pickle.dumps(large)) < 2000
    assert np.array_equal(pickle.loads(pickle.dumps(large))[0].image, large[0].image)


# ---- scenes


def same(a: scenes.Scene, b: scenes.Scene) -> bool:
    return (
        list(a.images) == list(b.images)
        and all(np.array_equal(a.images[name], b.images[name]) for name in a.images)
        and np.array_equal(a.labels.ids, b.labels.ids)
        and [one.box for one in a.labels.everything] == [one.box for one in b.labels.everything]
    )


@pytest.mark.parametrize("name", list(scenes.PRESETS))
def test_scene_k_follows_from_seed_and_k_alone(name, pieces, rooms):
    changes = {"size": SIZE, **({} if "canvas" in scenes.PRESETS[name].scale_of else {"scale": (0.3, 0.9)})}
    recipe = scenes.preset(name, **changes)
    one, other = composer(pieces, rooms, recipe), composer(pieces, rooms, recipe)
    made = [one.scene(k) for k in range(4)]
    other = pickle.loads(pickle.dumps(other))
    for k in (3, 1, 0, 2):
        assert same(made[k], other.scene(k))
    assert not same(made[0], made[1])
    assert not same(made[0], composer(pieces, rooms, recipe, seed=6).scene(0))
    assert not same(made[1], composer(pieces, rooms, recipe, seed=6).scene(0)), "not of their sum"
    assert made[0].image.shape == (*SIZE, 3)
    assert made[0].image.dtype == np.uint8


def test_places_are_the_same_for_every_blend(pieces, rooms):
    every = composer(pieces, rooms, SMALL.but(blend=("gaussian", "poisson", "none", "box", "motion"), same_scene=True))
    scene = every.scene(2)
    assert list(scene.images) == ["gaussian", "poisson", "none", "box", "motion"]
    for blend in scene.images:
        alone = composer(pieces, rooms, SMALL.but(blend=(blend,))).scene(2)
        assert np.array_equal(alone.labels.ids, scene.labels.ids)
        assert np.array_equal(alone.image, scene.images[blend])
    assert same(every.scene(2, ["none"]), composer(pieces, rooms).scene(2))
    drawn = composer(pieces, rooms, SMALL.but(blend=("none", "box")))
    assert {blend for k in range(12) for blend in drawn.scene(k).images} == {"none", "box"}


REACH = {"none": 0, "gaussian": 2, "box": 1, "poisson": 0, "mixed": 0}


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("blend", list(REACH))
def test_every_changed_pixel_lies_in_a_mask(blend, compatible, pieces, rooms):
    make = composer(pieces, rooms, SMALL.but(blend=(blend,), compatible=compatible, scale_of="cutout"))
    for k in range(4):
        scene = make.scene(k)
        inside = np.zeros(SIZE, np.uint8)
        for one in scene.placed:
            # Poisson's equation is solved where the mask is one half, any alpha shows otherwise.
            shown = one.solid if blend in ("poisson", "mixed") else one.mask > 0
            part, where = clipped((one.y, one.x, shown), SIZE)
            inside[where] |= part
        reach = 2 * REACH[blend] + 1
        allowed = cv2.dilate(inside, np.ones((reach, reach), np.uint8)) > 0
        changed = (scene.image != scene.background).any(2)
        assert changed.any()
        assert not (changed & ~allowed).any()


def test_labels_are_of_what_is_visible(pieces, rooms):
    make = composer(pieces, rooms, SMALL.but(objects=(5, 9), max_truncation=0.6))
    hidden = 0
    for k in range(20):
        scene = make.scene(k)
        labels, taken = scene.labels, np.zeros(SIZE, int)
        for one in labels.everything:
            mask, whole = labels.mask(one), labels.amodal_mask(one)
            taken += mask
            assert not (mask & ~whole).any()
            assert (one.area, one.amodal_area) == (mask.sum(), whole.sum())
            assert one.full_area >= one.amodal_area
            hidden += one.area < one.amodal_area
            for box, of in ((one.box, mask), (one.amodal_box, whole)):
                found = cutouts.bounding_box(of)
                assert box == (found and (found[1], found[0], found[3], found[2]))
            if one.area:
                assert np.array_equal(coco_masks.decode(labels.rle(one)) > 0, mask)
        assert taken.max() == 1
        assert np.array_equal(taken == 0, labels.ids == -1)
        assert np.array_equal(labels.semantic() > 0, labels.ids >= 0)
        # Hard pasted, the topmost object's pixels are what is seen.
        top = labels.everything[-1]
        one = scene.placed[-1]
        part, where = clipped((one.y, one.x, one.image), SIZE)
        opaque, _ = clipped((one.y, one.x, one.mask == 255), SIZE)
        assert np.array_equal(scene.image[where][opaque], part[opaque])
        assert top.area == top.amodal_area
    assert hidden > 10


def test_labels_of_a_scene_made_by_hand():
    square = np.full((4, 4), 255, np.uint8)
    image = np.zeros((4, 4, 3), np.uint8)
    placed = [
        Placed(image, square, -2, 1, "a", "half out"),
        Placed(image, square, 4, 4, "b", "below"),
        Placed(image, square, 4, 5, "a", "on top"),
        Placed(image, square, 20, 0, "a", "far off"),
        Placed(image, square, -9, -9, "a", "far off"),
    ]
    ids = np.full((10, 12), -1, np.int32)
    for number, one in enumerate(placed):
        paint(ids, one, number)
    labels = make_labels(placed, ids, ("a", "b"))
    out, below, top, *nowhere = labels.everything
    assert (out.box, out.amodal_box, out.truncation, out.visibility) == ((1, 0, 4, 2), (1, 0, 4, 2), 0.5, 1.0)
    assert (below.box, below.amodal_box, below.truncation, below.visibility) == ((4, 4, 1, 4), (4, 4, 4, 4), 0.0, 0.25)
    assert (top.area, top.amodal_area, top.full_area) == (16, 16, 16)
    assert all((one.box, one.visibility, one.truncation) == (None, 0.0, 1.0) for one in nowhere)
    assert labels.semantic()[5, 4] == 2
    assert [one.name for one in labels.instances] == ["half out", "below", "on top"]


def test_an_object_is_where_its_mask_is_one_half():
    mask = np.array([[0, 1, 127, 128, 255]], np.uint8)
    one = Placed(np.zeros((1, 5, 3), np.uint8), mask, 0, 0, "a", "soft")
    ids = np.full((3, 8), -1, np.int16)
    paint(ids, one, 0)
    assert make_labels([one], ids, ("a",)).everything[0].box == (3, 0, 2, 1)


def test_limits_are_kept(pieces, rooms):
    truncated = visible = 0.0
    make = composer(pieces, rooms, SMALL.but(objects=(6, 9), max_truncation=0.3, min_visibility=0.6, max_overlap=0.2))
    for k in range(25):
        scene = make.scene(k)
        everything = scene.labels.everything
        for one in everything:
            truncated = max(truncated, one.truncation)
            assert one.truncation <= 0.3 + 1e-9
            assert one.visibility >= 0.6
        visible += sum(one.visibility < 1 for one in everything)
        boxes = [(one.x, one.y, one.x + one.mask.shape[1], one.y + one.mask.shape[0]) for one in scene.placed]
        for n, a in enumerate(boxes):
            for b in boxes[:n]:
                wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
                common = max(0, wide) * max(0, tall)
                union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - common
                assert common / union <= 0.25, "soft masks reach beyond their solid box"
    assert truncated > 0.1
    assert visible > 3, "the limits were tried"
    assert sum(make.scene(k).left_out for k in range(25)) > 0
    none = composer(pieces, rooms, SMALL.but(max_truncation=0.0))
    assert all(one.truncation == 0 for k in range(10) for one in none.scene(k).labels.everything)


def test_broken_cutouts_are_replaced_and_named(tmp_path, rooms):
    for n in range(10):
        save(tmp_path / "x" / f"{n}.png", np.dstack([solid(30, 30), disc(30)]))
    for n in (2, 5):
        (tmp_path / "x" / f"{n}.png").write_bytes(b"broken")
    make = scenes.SceneComposer(scenes.Cutouts.from_folder(tmp_path), rooms, SMALL)
    for k in range(10):
        scene = make.scene(k)
        assert len(scene.placed) + scene.left_out >= 3
        assert same(scene, scenes.SceneComposer(scenes.Cutouts.from_folder(tmp_path), rooms, SMALL).scene(k))
    assert list(make.skipped) == ["x/2.png", "x/5.png"] or list(make.skipped) == ["x/5.png", "x/2.png"]
    for n in range(10):
        (tmp_path / "x" / f"{n}.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"64 files in a row cannot be used; the last of them is x/.\.png: "):
        scenes.SceneComposer(scenes.Cutouts.from_folder(tmp_path), rooms, SMALL).scene(0)


def test_distractors_occlude_and_are_not_labelled(pieces, rooms):
    recipe = SMALL.but(distractors=(2, 2), objects=(4, 4))
    scene = composer(pieces[:2], rooms, recipe, distractors=pieces[2:3]).scene(1)
    assert [one.distractor for one in scene.labels.everything] == [False] * 4 + [True] * 2
    assert all(one.category == "round" for one in scene.labels.instances)
    assert scene.labels.categories == ("round",)
    distracted = np.isin(scene.labels.ids, (4, 5))
    assert distracted.any()
    assert not scene.labels.semantic()[distracted].any()
    with pytest.raises(ValueError, match="distractors"):
        composer(pieces, rooms, recipe)
    with pytest.raises(ValueError, match="distractors"):
        composer(pieces, rooms, SMALL, distractors=pieces)


def test_the_whole_box_is_pasted_at_level_box(pieces, rooms):
    scene = composer(pieces, rooms, SMALL.but(level="box", angle=(0.0, 0.0), objects=(1, 1))).scene(0)
    assert scene.placed[0].mask.min() == 255


def test_categories_are_drawn_evenly_if_asked(pieces, rooms):
    def share(balance):
        make = composer(pieces, rooms, SMALL.but(balance=balance, objects=(8, 8), tries=1))
        names = [one.category for k in range(25) for one in make.scene(k).placed]
        return names.count("long") / len(names)

    assert 0.15 < share(False) < 0.35
    assert 0.4 < share(True) < 0.6


def test_objects_stand_on_the_points_of_support(pieces, rooms):
    room = scenes.Background(rooms[2], "room")
    recipe = SMALL.but(fit="stretch", scale=(1.0, 1.0), scale_of="cutout", angle=(0.0, 0.0), max_truncation=1.0)
    make = composer(pieces[:1], [room], recipe, support={"room": [(100, 150, 0.5)]})
    one = make.scene(0).placed[0]
    enlarged = (SIZE[0] / 200, SIZE[1] / 300)
    assert one.y + one.mask.shape[0] - 1 == round(100.5 * enlarged[0] - 0.5)
    foot = np.flatnonzero(one.mask[-1])
    assert abs(one.x + foot.mean() - (150.5 * enlarged[1] - 0.5)) <= 0.5
    assert abs(one.mask.shape[0] - 40 * 0.5 * np.sqrt(enlarged[0] * enlarged[1])) <= 1
    free = composer(pieces[:1], [room], recipe, support={"elsewhere": [(100, 150, 0.5)]})
    assert free.scene(0).placed[0].y != one.y


def test_what_a_background_shows_stays_labelled_while_it_is_visible(pieces, rooms):
    mask = np.zeros(SIZE, bool)
    mask[30:60, 40:90] = True
    room = scenes.Background(rooms[1], "room", [scenes.Known(mask, "sofa", "room#1")])

    class Rooms(list):
        categories = ("sofa",)

    make = composer(pieces, Rooms([room]), SMALL.but(angle=(0.0, 0.0)))
    assert make.categories == ("long", "round", "sofa")
    scene = make.scene(0)
    sofa = scene.labels.everything[0]
    covered = np.zeros(SIZE, bool)
    for one in scene.labels.everything[1:]:
        covered |= scene.labels.amodal_mask(one)
    assert np.array_equal(scene.labels.mask(sofa), mask & ~covered)
    assert sofa.category == "sofa"


def test_compatible_scenes_are_pasted_as_pillow_and_opencv_do(pieces, rooms):
    recipe = scenes.preset("dwibedi2017-compatible", size=SIZE, scale=(0.4, 0.9), blend=("none", "gaussian", "box"))
    for k in range(4):
        scene = composer(pieces, rooms, recipe).scene(k)
        expected = {name: Image.fromarray(scene.background) for name in scene.images}
        for one in scene.placed:
            assert set(np.unique(one.mask)) <= {0, 255}
            alphas = {
                "none": one.mask,
                "gaussian": cv2.GaussianBlur(one.mask, (5, 5), 2),
                "box": cv2.blur(one.mask, (3, 3)),
            }
            for name, alpha in alphas.items():
                expected[name].paste(Image.fromarray(one.image), (one.x, one.y), Image.fromarray(alpha))
        assert np.array_equal(scene.images["none"], np.array(expected["none"]))
        for name in ("gaussian", "box"):
            # They round the blurred mask to 8 bits first: 1/2 level of 255, times a difference of up to 255, for each
            # of the objects that lie on top of one another.
            difference = np.abs(scene.images[name].astype(int) - np.array(expected[name]).astype(int))
            assert difference.max() <= 2


@pytest.mark.parametrize("compatible", [False, True])
def test_the_compatible_poisson_leaves_the_border_of_the_box(compatible, pieces, rooms):
    recipe = SMALL.but(level="box", objects=(1, 1), max_truncation=0.0, scale_of="cutout", angle=(0.0, 0.0))
    scene = composer(pieces, rooms, recipe.but(blend=("poisson",), compatible=compatible)).scene(1)
    one = scene.placed[0]
    h, w = one.mask.shape
    changed = (scene.image != scene.background).any(2)[one.y : one.y + h, one.x : one.x + w]
    assert changed[1:-1, 1:-1].mean() > 0.8
    border = np.ones((h, w), bool)
    border[1:-1, 1:-1] = False
    assert changed[border].mean() == 0 if compatible else changed[border].mean() > 0.5


def test_motion_blur_of_a_scene_is_that_of_its_definition(rooms):
    convolve = pytest.importorskip("scipy.signal").convolve2d
    for k in range(12):
        motion = scenes.Motion.draw(np.random.default_rng(k))
        kernel = ops.motion_kernel(*motion).numpy()
        image = torch.from_numpy(rooms[1])
        made = blending._blurred(image, motion, scenes.preset("dwibedi2017-compatible")).numpy()
        channels = [convolve(rooms[1][..., c], kernel, mode="same", fillvalue=255.0) for c in range(3)]
        assert np.array_equal(made, np.stack(channels, 2).astype(np.uint8))
        made = blending._blurred(image, motion, scenes.preset("dwibedi2017")).numpy()
        flipped = np.ascontiguousarray(kernel[::-1, ::-1])
        assert np.abs(made.astype(int) - cv2.filter2D(rooms[1], -1, flipped)).max() <= 1  # ties


def test_the_compatible_overlap_is_of_the_earlier_box(pieces, rooms):
    from fastnuggets.scenes.composer import _Layout

    layout = _Layout.__new__(_Layout)
    layout.boxes = [(0, 0, 10, 10)]
    inner, outer = (0, 0, 5, 5), (0, 0, 20, 20)
    layout.recipe = SMALL.but(overlap="earlier")
    assert not layout._overlaps(inner, 0.75)  # 25 of 100
    assert layout._overlaps(outer, 0.75)  # 100 of 100
    layout.recipe = SMALL
    assert not layout._overlaps(inner, 0.75)
    assert not layout._overlaps(outer, 0.75)  # 100 of 400
    assert layout._overlaps((0, 0, 10, 9), 0.75)


def test_a_compatible_scene_is_drawn_again_only_for_its_last_object(pieces, rooms):
    recipe = scenes.preset(
        "dwibedi2017-compatible", size=SIZE, scale=(0.9, 1.0), objects=(9, 9), max_overlap=0.1, tries=2
    )
    recipe = recipe.but(blend=("none",))
    for k in range(5):
        scene = composer(pieces, rooms, recipe).scene(k)
        assert len(scene.placed) == 9, "none is left out, however it overlaps"


def test_colours_are_jittered_within_their_range(pieces):
    from fastnuggets.scenes.transforms import jitter

    grey = np.full((4, 4, 3), 100, np.uint8)
    seen = [jitter(grey, np.random.default_rng(k), 0.2, 0.0, 0.1)[0, 0] for k in range(50)]
    assert np.ptp(seen) > 20
    assert np.min(seen) >= 100 * 0.8 * 0.9 - 1
    assert np.max(seen) <= 100 * 1.2 * 1.1 + 1
    assert jitter(grey, np.random.default_rng(0), 0.0, 0.0, 0.0) is grey


def test_a_turn_by_a_right_angle_is_exact(pieces):
    from fastnuggets.scenes.transforms import Form, transform

    piece = pieces[0]
    for quarter, angle in ((1, 90.0), (2, 180.0), (3, 270.0)):
        turned = transform(Form(piece.image, piece.mask), 1.0, angle, False, True)
        assert np.array_equal(turned.mask, np.rot90(piece.mask, quarter))
        opaque = turned.mask == 255
        assert np.abs(turned.image.astype(int) - np.rot90(piece.image, quarter))[opaque].max() <= 1
    wedge = np.tril(np.full((20, 20), 255, np.uint8))
    flipped = transform(Form(np.dstack([wedge] * 3), wedge), 1.0, 0.0, True, False)
    assert np.array_equal(flipped.mask, wedge[:, ::-1])
    assert np.array_equal(flipped.image[..., 0], wedge[:, ::-1])
    half = transform(Form(piece.image, piece.mask), 0.5, 0.0, True, False)
    assert half.mask.shape == (20, 20)
    assert set(np.unique(half.mask)) == {0, 255}
    mean = piece.image.reshape(20, 2, 20, 2, 3).mean((1, 3))[:, ::-1]
    assert np.abs(half.image - mean).max() <= 0.75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blend": ("nothing",)}, "blend must be some of"),
        ({"blend": ()}, "blend must be some of"),
        ({"objects": (3, 2)}, "objects must be two rising numbers"),
        ({"scale": (0.0, 1.0)}, "scale must be above 0"),
        ({"flip": 2.0}, "flip must be in"),
        ({"level": "pixel"}, "level must be one of"),
        ({"size": (4, 4)}, "size must be"),
        ({"tries": 0}, "tries must be"),
        ({"max_overlap": -1.0}, "max_overlap must be"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_wrong_arguments_are_errors(pieces, rooms):
    with pytest.raises(ValueError, match="preset must be one of"):
        scenes.preset("x")
    with pytest.raises(ValueError, match="there must be cut-outs and backgrounds"):
        composer([], rooms)
    with pytest.raises(ValueError, match="seed"):
        composer(pieces, rooms, seed=-1)
    with pytest.raises(ValueError, match="number"):
        composer(pieces, rooms).scene(-1)
    with pytest.raises(ValueError, match=r"expected \[H, W, 3\] uint8, got \[8, 8\] float64 at 0"):
        composer(pieces, [np.zeros((8, 8))]).scene(0)


# ---- one object on one image


@pytest.mark.parametrize("mode", ["none", "gaussian", "box", "difference", "poisson", "mixed", "average", "multiband"])
def test_one_object_is_blended_where_it_is_said(mode, rooms):
    under, over = rooms[0], np.ascontiguousarray(rooms[2][:40, :50])
    mask = np.zeros((40, 50), np.uint8)
    mask[10:30, 10:40] = 255
    made = blending.blend_one(under, over, mask, (-5, 60), mode)
    assert made.shape == under.shape
    assert made.dtype == np.uint8
    core = np.s_[12:18, 75:95]
    assert (made[core] != under[core]).any()
    if mode != "multiband":
        assert np.array_equal(made[30:], under[30:])
    if mode in ("none", "gaussian", "box"):
        assert np.array_equal(made[core], over[17:23, 15:35])


# ---- text


def test_text_is_pasted_as_synthtext_does(rooms):
    mask = cv2.putText(np.zeros((30, 90), np.uint8), "text", (3, 22), cv2.FONT_HERSHEY_SIMPLEX, 1, 255, 2)
    white = np.full((30, 90, 3), 255, np.uint8)
    dark = rooms[2] // 8
    before = dark.copy()
    made = scenes.paste_text(dark, white, mask, (60, 100), height=20)
    assert np.array_equal(dark, before)
    assert np.array_equal(made, scenes.paste_text(dark, white, mask, (60, 100), height=20))
    around = np.zeros(dark.shape[:2], bool)
    y, x, h, w = cutouts.bounding_box(mask)
    around[60 + y - 19 : 60 + y + h + 19, 100 + x - 19 : 100 + x + w + 19] = True
    assert np.array_equal(made[~around], dark[~around]), "the rectangle's outermost pixels are given values"
    letters = blending.on_zeros(mask, dark.shape, (60, 100)) == 255
    assert made[letters].mean() > dark[letters].mean() + 100
    assert np.array_equal(scenes.paste_text(dark, white, 0 * mask, (0, 0), height=10), dark)
    assert np.array_equal(scenes.paste_text(dark, white, mask, (500, 0), height=10), dark)
    assert scenes.paste_text(dark, white, mask, (-10, 250), height=40).shape == dark.shape
    with pytest.raises(ValueError, match="text and mask must be"):
        scenes.paste_text(dark, white, mask[1:], (0, 0), height=10)


@pytest.mark.parametrize(
    ("strength", "factor", "guidance"), [(40, 1.0, "mixed"), (25, 1.5, "mixed"), (15, 1.5, "import")]
)
def test_text_that_would_be_lost_is_made_stronger(strength, factor, guidance, monkeypatch):
    board = np.indices((20, 20)).sum(0)[..., None] % 2 * np.ones(3)
    under, around = (60 + 30 * board).astype(np.float32), np.full(3, 50.0)
    seen = {}

    def solve(background, fronts, masks, **options):
        seen.update(options, front=fronts[0].numpy())
        return background

    monkeypatch.setattr(synthtext.ops, "poisson_blend", solve)
    synthtext._blended(under, around + strength * board, around)
    assert seen["guidance"] == guidance
    expected = around + factor * strength * board + (under if guidance == "import" else 0)
    assert np.allclose(255 * seen["front"], expected, atol=1e-4)


# ---- for a DataLoader


def equal(a, b) -> bool:
    (image, target), (other, expected) = a, b
    return torch.equal(image, other) and all(
        torch.equal(target[name], expected[name]) if torch.is_tensor(target[name]) else target[name] == expected[name]
        for name in expected
    )


def test_a_loader_gives_the_same_with_any_number_of_workers(pieces, rooms):
    data = scenes.PasteDataset(composer(pieces, rooms), 8)
    assert len(data) == 8
    plain = [data[k] for k in range(8)]
    image, target = plain[3]
    scene = composer(pieces, rooms).scene(3)
    assert torch.equal(image, torch.from_numpy(scene.image).permute(2, 0, 1))
    found = scene.labels.instances
    assert target["boxes"].tolist() == [[x, y, x + w, y + h] for x, y, w, h in (one.box for one in found)]
    assert target["masks"].shape == (len(found), *SIZE)
    assert target["masks"].flatten(1).sum(1).tolist() == target["area"].tolist()
    assert target["image_id"] == 3
    loader = torch.utils.data.DataLoader(
        data, batch_size=2, num_workers=2, persistent_workers=True, collate_fn=data.collate
    )
    for epoch in range(2):
        data.set_epoch(epoch)
        loaded = [(image, target) for batch, targets in loader for image, target in zip(batch, targets, strict=True)]
        expected = plain if epoch == 0 else [scenes.PasteDataset(composer(pieces, rooms), 16)[8 + k] for k in range(8)]
        assert all(equal(a, b) for a, b in zip(loaded, expected, strict=True))


def test_a_data_set_of_all_blends_takes_them_in_turn(pieces, rooms):
    recipe = SMALL.but(blend=("none", "box"), same_scene=True)
    data = scenes.PasteDataset(composer(pieces, rooms, recipe), 6, lambda image, target: target["image_id"])
    assert [data[k] for k in range(6)] == list(range(6))
    plain = scenes.PasteDataset(composer(pieces, rooms, recipe), 6, masks=False)
    scene = composer(pieces, rooms, recipe).scene(1)
    assert torch.equal(plain[3][0], torch.from_numpy(scene.images["box"]).permute(2, 0, 1))
    assert "masks" not in plain[3][1]
    with pytest.raises(IndexError):
        plain[6]


# ---- in a batch


def pool(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 16), (20, 9), (15, 15)]
    pixels = [torch.rand(3, *shape, generator=generator) for shape in shapes]
    masks = [torch.ones(shape) for shape in shapes]
    if dtype == torch.uint8:
        pixels, masks = [(255 * p).byte() for p in pixels], [(255 * m).byte() for m in masks]
    return ops.pack_objects([p.to(dtype) for p in pixels], [m.to(dtype) for m in masks])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_random_paste_says_what_it_did(dtype):
    layer = nn.RandomPaste(pool(dtype), count=(0, 4), mode="none")
    images = (torch.rand(6, 3, 64, 80) * (255 if dtype == torch.uint8 else 1)).to(dtype)
    before = images.clone()
    whole = [torch.ones(2, 64, 80, dtype=torch.bool)] * 6
    torch.manual_seed(3)
    made = layer(images, whole)
    assert torch.equal(images, before)
    assert made.ptr[0] == 0
    assert made.ptr[-1] == len(made.objects)
    assert len(made.objects) > 6
    for b in range(6):
        pasted = made.ids[b] >= 0
        changed = (made.images[b] != images[b]).any(0)
        assert not (pasted & ~changed).any()
        # Turned edges are softer than one half outside of the mask, by less than two pixels.
        near = torch.nn.functional.max_pool2d(pasted[None, None].float(), 5, 1, 2)[0, 0] > 0
        assert not (changed & ~near).any()
        assert torch.equal(made.masks[b], (~pasted).expand(2, -1, -1))
        numbers = made.ids[b][pasted]
        assert ((numbers >= made.ptr[b]) & (numbers < made.ptr[b + 1])).all()
    torch.manual_seed(3)
    again = layer(images)
    assert torch.equal(again.images, made.images)
    assert again.masks is None
    assert torch.equal(layer.eval()(images).images, images)
    assert (layer(images).ids == -1).all()


def test_random_paste_keeps_objects_inside_as_far_as_is_said():
    def least(truncation):
        layer = nn.RandomPaste(pool(), count=(1, 1), truncation=truncation, scale=(1.0, 1.0), angle=0.0)
        made = layer(torch.zeros(64, 3, 40, 40))
        whole = layer.sizes[made.objects, 1:].prod(1)
        return ((made.ids >= 0).flatten(1).sum(1) / whole).min()

    torch.manual_seed(0)
    assert least(0.0) > 0.85, "a line may be lost to the half pixels"
    assert 0.45 < least(0.25) < 0.8, "three quarters of the height and of the width are left"
    assert least(1.0) < 0.3


def test_random_paste_lets_gradients_through():
    layer = nn.RandomPaste(pool(), count=(2, 2), mode="none", truncation=0.0, scale=(1.0, 1.0), angle=0.0)
    images = torch.rand(2, 3, 64, 80, requires_grad=True)
    made = layer(images)
    made.images.sum().backward()
    seen = (made.ids < 0)[:, None].expand_as(images)
    assert images.grad[~seen].mean() < 0.2
    assert images.grad[seen].mean() > 0.9
    for wrong in ({"count": (2, 1)}, {"scale": (0.0, 1.0)}, {"flip": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            nn.RandomPaste(pool(), **wrong)


def test_copy_paste_takes_instances_of_another_image():
    ids = torch.full((3, 32, 40), -1)
    ids[0, 4:12, 4:12], ids[0, 20:28, 20:30] = 0, 1
    ids[1, 10:20, 10:20] = 0
    images = torch.rand(3, 3, 32, 40)
    layer = nn.CopyPaste(p=1.0, flip=0.0, mode="none", max_instances=8)
    torch.manual_seed(0)
    made = layer(images, ids)
    for b in range(3):
        partner = int(made.partner[b])
        assert partner != b
        taken = ids[partner] >= 0
        assert torch.equal(made.images[b], torch.where(taken, images[partner], images[b]))
        assert torch.equal(made.ids[b], torch.where(taken, ids[partner] + 8, ids[b]))
    flipped = nn.CopyPaste(p=1.0, flip=1.0, mode="none", max_instances=8)
    torch.manual_seed(0)
    mirrored = flipped(images, ids)
    assert torch.equal(mirrored.ids >= 8, (made.ids >= 8).flip(-1))
    assert torch.equal(nn.CopyPaste(p=0.0)(images, ids).images, images)
    assert layer.eval()(images, ids).images is images
    with pytest.raises(ValueError, match="ids must be integers"):
        layer(images, ids.float())
