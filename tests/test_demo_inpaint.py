import json
import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("cv2")
pytest.importorskip("matplotlib")

from fastnuggets import demo, demo_inpaint, report_inpaint
from fastnuggets.demo_inpaint import (
    KINDS,
    METHODS,
    PHOTOGRAPHS,
    SETS,
    Data,
    Filled,
    Plan,
    biharmonic,
    fit_normal,
    held_out,
    hide,
    judge,
    load,
    nearest,
    normal,
    patches,
    telea,
    varied,
)
from fastnuggets.systems.vaeac import DRAWN

TINY = Plan(seeds=2, steps=2, tested=4, kinds=("half", "small hole"), batch=4, widths=(4, 4, 4, 4), latent=2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_judge_by_hand():
    truth = torch.tensor([[[0.5, 0.2]], [[0.1, 0.4]]])
    mask = torch.tensor([[[True, False]], [[True, True]]])
    mean = torch.tensor([[[0.6, 9.0]], [[0.1, 0.2]]])
    draws = torch.tensor([0.0, 0.3, 0.45, 0.55, 1.0])[:, None, None, None].expand(5, 2, 1, 2)
    found = judge(Filled(mean, draws, draws[1:3], -6.0), truth, mask)
    assert found["rmse"] == pytest.approx((0.05 / 3) ** 0.5)
    assert found["psnr"] == pytest.approx(-10 * math.log10(0.05 / 3))
    assert found["draw"] == pytest.approx(((0.25 + 0.01 + 0.16) / 3) ** 0.5)
    assert found["guess"] == pytest.approx(((0.04 + 0.04 + 0.01) / 3) ** 0.5)
    assert found["coverage"] == pytest.approx(2 / 3) and found["width"] == pytest.approx(0.25)  # 0.3 to 0.55
    assert found["nats"] == -2
    assert set(judge(Filled(mean), truth, mask)) == {"rmse", "psnr"}


@pytest.mark.parametrize(("kind", "least", "most"), [(k, *s) for k, s in zip(
    KINDS, [(0.5, 0.5), (0.3, 0.7), (0.03, 0.1), (0.2, 0.8), (0.8, 0.99)], strict=True)])  # fmt: skip
def test_what_is_hidden(kind, least, most):
    for side in (8, 16):
        mask = hide(kind, 300, side, generator())
        share = mask.double().mean((1, 2))
        assert mask.shape == (300, side, side) and share.min() >= least and share.max() <= most
    assert 300 * 0.95**64 > 10  # so that without a pixel put back, some images of 8 x 8 would be hidden whole


def test_digits():
    data = load("digits", 50, 0)
    assert data.train.shape == (1747, 1, 8, 8) and data.test.shape == (50, 1, 8, 8)
    assert data.train.min() == pytest.approx(0.5 / 17) and data.train.max() == pytest.approx(16.5 / 17)
    spread = data.spread(data.train, generator())
    assert torch.equal((spread * 17).floor(), (data.train * 17).floor())
    assert 0 < spread.min() < 1e-4 and 1 - 1e-4 < spread.max() < 1
    assert not torch.equal(load("digits", 50, 1).test, data.test)


def test_photographs_are_held_out_whole():
    gone = [held_out(seed) for seed in range(4)]
    assert sorted(name for names in gone for name in names) == sorted(PHOTOGRAPHS) and held_out(4) == gone[0]
    one, two = load("photographs", 10, 0), load("photographs", 10, 1)
    assert one.test.shape == (10, 1, 16, 16) and one.train.min() >= 0 and one.train.max() <= 1 and one.step == 0
    # Every patch of what seed 1 holds out is one that seed 0 learns from, but for those off its grid.
    known = {tuple(patch.flatten().tolist()) for patch in one.train}
    assert all(tuple(patch.flatten().tolist()) in known for patch in two.test)
    assert not any(tuple(patch.flatten().tolist()) in known for patch in one.test)


def test_varied_photographs_have_the_same_shapes():
    """Up to one of eight symmetries a varied image is a line in the original: another contrast, another brightness."""
    images = torch.rand(40, 1, 4, 4, generator=generator())
    seen, contrasts = set(), []
    for image, made in zip(images, varied(images, generator(1)), strict=True):
        turned = [symmetry for side in (image, image.mT) for symmetry in (side, side.flip(1), side.flip(2))]
        turned += [side.flip(1, 2) for side in (image, image.mT)]
        told = [float(np.corrcoef(one.flatten(), made.flatten())[0, 1]) for one in turned]
        assert max(told) == pytest.approx(1, abs=1e-5)
        seen.add(int(np.argmax(told)))
        contrasts.append((made.std() / image.std()).item())
        assert abs(made.mean() - image.mean()) < 0.151
    assert len(seen) == 8 and 0.4 <= min(contrasts) < 0.6 and 1 < max(contrasts) < 1.2001


def test_patches():
    image = torch.arange(48.0).view(6, 8)
    found = patches(image, 4, 2)
    assert found.shape == (6, 1, 4, 4)
    assert torch.equal(found[4, 0], image[2:6, 2:6])


def test_normal_against_the_joint_density():
    """ln p(hidden | seen) = ln p(all) - ln p(seen); draws and mean by moments."""
    root = torch.randn(4, 4, generator=generator(), dtype=torch.float64)
    centre, cov = torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64), root @ root.T + torch.eye(4).double()
    image = torch.randn(1, 2, 2, generator=generator())
    mask = torch.tensor([[[True, False], [True, False]]])
    seen = [1, 3]
    joint = MultivariateNormal(centre, cov).log_prob(image.flatten().double())
    part = MultivariateNormal(centre[seen], cov[seen][:, seen]).log_prob(image.flatten()[seen].double())
    many = 100
    found = normal(image, image.expand(many, 2, 2), mask.expand(many, 2, 2), generator(), (centre, cov))
    assert found.nats / many == pytest.approx((joint - part).item())
    assert torch.equal(found.mean[0][~mask[0]], image[0][~mask[0]])
    assert torch.equal(found.draws[:, :, ~mask[0]], image[0][~mask[0]].expand(DRAWN, many, 2))
    drawn = found.draws[:, :, mask[0]].flatten(0, 1)  # 3900
    std = drawn.std(0)
    assert ((drawn.mean(0) - found.mean[0][mask[0]]).abs() < 5 * std / 62).all()
    inverse = torch.linalg.inv(cov)[[0, 2]][:, [0, 2]]  # of the precision's block
    torch.testing.assert_close(drawn.T.cov(), torch.linalg.inv(inverse).float(), rtol=0.15, atol=0.1)


def test_fitted_normal():
    x = torch.randn(4000, 2, 2, generator=generator()) * torch.tensor([1.0, 2.0]) + 3
    centre, cov = fit_normal(x)
    assert (centre - 3).abs().max() < 0.2 and (cov.diag() - torch.tensor([1, 4, 1, 4])).abs().max() < 0.4


def test_nearest():
    train = torch.rand(60, 4, 4, generator=generator())
    mask = torch.rand(5, 4, 4, generator=generator(1)) < 0.5
    images = torch.where(mask, 7.0, train[20:25])  # what is seen is exactly that of one of them
    found = nearest(train, images, mask)
    assert torch.equal(found.draws[0], train[20:25])
    distance = ((train[:, None] - images).square() * ~mask).sum((2, 3))
    best = train[distance.argsort(0)[:10]].mean(0)
    torch.testing.assert_close(found.mean, torch.where(mask, best, images))


@pytest.mark.parametrize("fill", [biharmonic, telea])
def test_smooth_images_are_filled_smoothly(fill):
    ramp = (torch.arange(16.0) / 20 + 0.1).expand(2, 16, 16)
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, 6:9, 6:9] = True
    made = fill(ramp, torch.where(mask, 0.9, ramp), mask).mean
    assert torch.equal(made[~mask], ramp[~mask])
    assert (made - ramp).abs().max() < 0.04  # measured: 0 and 0.031; the mask hides 0.9


def test_share_of_the_code():
    """Ten guesses with a variance of 2 about a mean that is off by 1, and pixels with a variance of 6."""
    scores = {"rmse": (1 + 0.2) ** 0.5, "guess": 3**0.5, "draw": 3.0}
    result = demo_inpaint.Result(TINY, {"digits": {"half": [{"VAEACConv": scores}]}}, {}, {}, 0.0, 0, 0)
    assert report_inpaint._of_code(result, "digits", "half") == pytest.approx(2 / 8)


def test_spread_has_no_effect_without_levels():
    images = torch.rand(2, 1, 4, 4)
    assert torch.equal(Data(images, images, 0.0).spread(images, generator()), images)


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_inpaint, "QUICK", TINY)
    assert demo.main(["inpaint", "--quick", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "inpaint.html").read_text()
    assert "http" not in page.replace("http://www.w3.org", "") and "NaN" not in page and "nan" not in page
    scores = json.loads((tmp_path / "inpaint.json").read_text())["scores"]
    for name in SETS:
        assert set(scores[name]) == set(TINY.kinds)
        for kind in TINY.kinds:
            first, second = scores[name][kind]
            assert first["mean"] != second["mean"] and set(first) == set(METHODS)
            assert all(0.01 < first[method]["rmse"] < 1 for method in METHODS)
            assert first["normal"]["rmse"] < first["mean"]["rmse"]
    assert np.isfinite(scores["digits"]["half"][0]["VAEACConv"]["nats"])
    # Seeds that are done are kept, and a third is an addition.
    capsys.readouterr()
    again = demo_inpaint.run(TINY._replace(seeds=3), tmp_path / "inpaint")
    assert (again.reused, again.parts) == (4, 6)
    assert again.scores["digits"]["half"][:2] == scores["digits"]["half"]
    assert report_inpaint.write(again, tmp_path).exists()
