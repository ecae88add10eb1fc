"""VAEAC as an imputer of scikit-learn, for arrays of floats with NaN. Importing this module needs scikit-learn."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastnuggets.molecules.files import need
from fastnuggets.systems.run import How, learn, settle
from fastnuggets.systems.tables import Column
from fastnuggets.systems.vaeac import VaeacSettings, VaeacSystem, split

_base, _validation = need("sklearn.base", "demo"), need("sklearn.utils.validation", "demo")
_random = need("sklearn.utils", "demo").check_random_state


class VAEACImputer(_base.OneToOneFeatureMixin, _base.TransformerMixin, _base.BaseEstimator):  # type: ignore[name-defined]
    """Fills NaN with the means of what a network says of them given the rest of the row.

    Args:
        categorical: places of the columns whose values are categories, whatever numbers stand for these; they are
            filled with the most frequent one.
        samples: codes drawn for each row: ``transform`` takes the mean over what is likeliest given each.
        epochs, steps, batch_size, learning_rate, tested, width, depth, latent, sigma, least_sigma, linear, masks,
            hidden: of the network and its training, as ``fastnuggets train vaeac --help`` explains them.
        random_state: int, RandomState or None, of everything that is drawn.
        device: where to compute.
        verbose: above 0, a bar of progress on a terminal.

    Attributes:
        system_: the trained system; None if every column was constant.
        columns_: which columns it knows [K]; the others were constant.
        n_features_in_, feature_names_in_: as scikit-learn has them.

    ``transform`` leaves every known value as it is. It is deterministic, but what fills a NaN depends on the row's
    place in X. Raises ValueError for a column without any value, and for a category that was not there in ``fit``.
    Ivanov, Figurnov, Vetrov, Variational Autoencoder with Arbitrary Conditioning, ICLR 2019, arXiv:1806.02382.
    """

    def __init__(
        self,
        *,
        categorical: Sequence[int] = (),
        samples: int = 10,
        epochs: int = 300,
        steps: int = 2000,
        batch_size: int = 64,
        learning_rate: float = 3e-4,
        tested: float = 0.15,
        width: int = 0,
        depth: int = 0,
        latent: int = 0,
        sigma: float = 0.0,
        least_sigma: float = 0.01,
        linear: bool = True,
        masks: str = "mcar",
        hidden: float = 0.2,
        random_state: Any = None,
        device: str = "cpu",
        verbose: int = 0,
    ) -> None:
        self.categorical = categorical
        self.samples = samples
        self.epochs = epochs
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.tested = tested
        self.width = width
        self.depth = depth
        self.latent = latent
        self.sigma = sigma
        self.least_sigma = least_sigma
        self.linear = linear
        self.masks = masks
        self.hidden = hidden
        self.random_state = random_state
        self.device = device
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> VAEACImputer:
        X = self._checked(X, reset=True)
        settings = self._settings()
        self.seed_ = int(_random(self.random_state).randint(2**31 - 1))
        empty = np.flatnonzero(np.isnan(X).all(0))
        if len(empty):
            raise ValueError(f"X: columns {empty.tolist()} have no value at all")
        least, most = np.nanmin(X, 0), np.nanmax(X, 0)
        self.columns_ = np.flatnonzero(least < most)
        self._constants = least
        self._known = [self._column(X[:, j], int(j)) for j in self.columns_]
        self.system_ = self._trained(X, settings) if len(self.columns_) else None
        return self

    def transform(self, X: Any) -> np.ndarray:
        """X [N, columns] with every NaN filled: numbers by means, categories by the most frequent one."""
        _validation.check_is_fitted(self)
        X = self._checked(X, reset=False)
        if not np.isnan(X).any():
            return X
        drawn = torch.from_numpy(self._drawn(X, likeliest=True))
        numbers = drawn.mean(0).numpy()
        for j in self._categorical():
            numbers[:, j] = drawn[:, :, j].mode(0).values.numpy()
        return np.where(np.isnan(X), numbers, X).astype(X.dtype)

    def sample(self, X: Any) -> np.ndarray:
        """X so many times, with every NaN drawn: [samples, N, columns]."""
        _validation.check_is_fitted(self)
        X = self._checked(X, reset=False)
        return np.where(np.isnan(X), self._drawn(X, likeliest=False), X).astype(X.dtype)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _checked(self, X: Any, *, reset: bool) -> np.ndarray:
        X = _validation.validate_data(
            self, X, reset=reset, dtype=[np.float64, np.float32], ensure_all_finite="allow-nan",
            ensure_min_samples=2 if reset else 1, copy=True,
        )  # fmt: skip
        return np.asarray(X)

    def _settings(self) -> VaeacSettings:
        if not self.samples >= 1:
            raise ValueError(f"samples: expected at least 1, got {self.samples}")
        names = ("epochs", "steps", "batch_size", "learning_rate", "tested", "width", "depth", "latent", "sigma",
                 "least_sigma", "linear", "masks", "hidden")  # fmt: skip
        return VaeacSettings(**{name: getattr(self, name) for name in names})

    def _categorical(self) -> list[int]:
        places = [int(j) for j in self.categorical]
        if any(not 0 <= j < self.n_features_in_ for j in places):
            raise ValueError(f"categorical: expected places from 0 to {self.n_features_in_ - 1}, got {places}")
        return places

    def _column(self, values: np.ndarray, j: int) -> Column:
        values = values[~np.isnan(values)].astype(np.float64)
        if j in self._categorical():
            return Column(str(j), "categorical", [repr(float(value)) for value in np.unique(values)])
        return Column(str(j), "number", (), float(values.mean()), max(float(values.std()), 1e-300))

    def _encoded(self, X: np.ndarray) -> torch.Tensor:
        """What the network is given of X: [N, columns it knows] float32."""
        made = np.empty((len(X), len(self._known)))
        for k, (j, column) in enumerate(zip(self.columns_, self._known, strict=True)):
            values, there = X[:, j].astype(np.float64), ~np.isnan(X[:, j])
            if not column.categories:
                made[:, k] = (values - column.mean) / column.std
                continue
            categories = np.array([float(category) for category in column.categories])
            place = np.searchsorted(categories, values).clip(max=len(categories) - 1)
            strange = there & (categories[place] != values)
            if strange.any():
                raise ValueError(f"X: column {j} has a category that was not there in fit: {values[strange][0]:g}")
            made[:, k] = np.where(there, place, np.nan)
        return torch.from_numpy(made).float()

    def _trained(self, X: np.ndarray, settings: VaeacSettings) -> VaeacSystem:
        data = split(self._encoded(X), self.tested, self.seed_, "X", least=2)
        # The network is made and trained without a trace in torch's own generator.
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(self.seed_)
            system = VaeacSystem(
                settings, {"columns": [list(column) for column in self._known], "learned": len(data.train)}
            )
            system.model.to(self.device)
            learn(system, data, Path(folder), How(self.seed_, self.device), progress=self.verbose > 0)
            settle(system, data, Path(folder))
        del system.optimizer  # twice the size of the network, and of no more use
        return system

    def _drawn(self, X: np.ndarray, *, likeliest: bool) -> np.ndarray:
        """[samples, N, columns] float64; only where X is NaN has it a meaning."""
        made = np.broadcast_to(self._constants.astype(np.float64), (self.samples, *X.shape)).copy()
        if self.system_ is None:
            return made
        x = self._encoded(X)
        known = torch.zeros_like(x, dtype=torch.bool)
        passes = self.system_.samples(x, known, self.samples, seed=self.seed_, likeliest=likeliest)
        for sample, drawn in zip(made, passes, strict=True):
            for j, column, values in zip(self.columns_, self._known, drawn.double().numpy().T, strict=True):
                if column.categories:
                    sample[:, j] = np.array([float(category) for category in column.categories])[values.astype(int)]
                else:
                    sample[:, j] = values * column.std + column.mean
        return made
