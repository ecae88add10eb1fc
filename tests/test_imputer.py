import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastnuggets.imputer import VAEACImputer

TINY = {"epochs": 1, "steps": 1, "width": 4, "depth": 1, "latent": 1, "samples": 2}


@parametrize_with_checks([VAEACImputer(**TINY)])
def test_estimator_checks(estimator, check):
    check(estimator)


def data(n=300, seed=0):
    """Two numbers that say each other, a category that follows them, a constant; a fifth is missing."""
    generator = np.random.default_rng(seed)
    a = generator.normal(size=n)
    whole = np.stack([a, 100 - 20 * a + generator.normal(size=n), np.where(a > 0, 7.0, -3.0), np.full(n, 4.0)], 1)
    gaps = generator.random(whole.shape) < 0.2
    return whole, gaps, np.where(gaps, np.nan, whole)


@pytest.fixture(scope="module")
def fitted():
    _, _, X = data()
    options = {"steps": 250, "width": 32, "depth": 1, "latent": 4, "learning_rate": 3e-3, "samples": 20}
    return VAEACImputer(epochs=1, categorical=[2], random_state=0, **options).fit(X)


def test_imputes(fitted):
    whole, gaps, X = data()
    filled = fitted.transform(X)
    assert np.array_equal(filled[~gaps], whole[~gaps]) and filled.dtype == np.float64
    assert set(filled[:, 2]) == {7.0, -3.0} and set(filled[:, 3]) == {4.0}
    error = np.abs(filled - whole)[gaps[:, 1] & ~gaps[:, 0], 1].mean()
    mean = np.abs(SimpleImputer().fit_transform(X) - whole)[gaps[:, 1] & ~gaps[:, 0], 1].mean()
    assert error < 0.4 * mean
    right = (filled == whole)[gaps[:, 2] & ~gaps[:, 0], 2].mean()
    assert right > 0.85
    assert np.array_equal(fitted.transform(X), filled)
    assert np.array_equal(fitted.transform(whole), whole)


def test_samples_differ_and_keep_what_is_known(fitted):
    whole, gaps, X = data()
    drawn = fitted.sample(X)
    assert drawn.shape == (20, *X.shape) and (drawn[:, ~gaps] == whole[~gaps]).all()
    lost = gaps.copy()
    lost[:, 2:] = False
    assert (drawn[:, lost].std(0) > 0).all()
    assert set(drawn[:, :, 2].flatten()) == {7.0, -3.0}


def test_pickle_clone_and_types(fitted):
    _, _, X = data()
    again = pickle.loads(pickle.dumps(fitted))
    assert np.array_equal(again.transform(X), fitted.transform(X))
    assert clone(fitted).get_params() == fitted.get_params()
    assert fitted.transform(X.astype(np.float32)).dtype == np.float32
    assert make_pipeline(VAEACImputer(**TINY), StandardScaler()).fit_transform(X).shape == X.shape


def test_torchs_generator_is_left_alone():
    _, _, X = data(40)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    VAEACImputer(**TINY, random_state=1).fit(X).transform(X)
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize(
    ("change", "options", "wrong"),
    [
        (lambda X: X[:, 0].fill(np.nan), {}, r"columns \[0\] have no value"),
        (lambda X: None, {"categorical": [9]}, "categorical"),
        (lambda X: None, {"samples": 0}, "samples"),
        (lambda X: None, {"width": -1}, "width"),
    ],
)
def test_bad_fits(change, options, wrong):
    _, _, X = data(20)
    change(X)
    with pytest.raises(ValueError, match=wrong):
        VAEACImputer(**{**TINY, **options}).fit(X)


def test_unknown_category(fitted):
    _, _, X = data(20)
    X[0, 2] = 5.0
    with pytest.raises(ValueError, match="column 2 has a category that was not there in fit: 5"):
        fitted.transform(X)
