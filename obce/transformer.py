"""H0 as a step of a scikit-learn pipeline: clouds in, persistence diagrams out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from obce.h0 import h0, h0_distances

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator, TransformerMixin

    _MISSING: str | None = None
else:
    try:
        from sklearn.base import BaseEstimator, TransformerMixin

        _MISSING = None
    except ImportError as error:
        # The names exist without scikit-learn, so that `from obce import *` works; making one says what is missing.
        _MISSING = f"H0Transformer needs scikit-learn ({error}); install it, for example by pip install scikit-learn."

        class BaseEstimator:
            """In place of scikit-learn's."""

        class TransformerMixin:
            """In place of scikit-learn's."""


class H0Transformer(TransformerMixin, BaseEstimator):
    """Persistence diagrams of a collection of clouds, as `obce.h0` gives them.

    Nothing is learnt but the number of coordinates, so that a later cloud of another kind is refused.

    Args:
        metric: a metric of `obce.h0`, or "precomputed": the clouds are then square distance matrices.
        p: exponent of metric "minkowski".
        max_edge: longest edge allowed, as in `obce.h0`; later merges have death +inf.
        backend: as in `obce.h0`.
        threads: as in `obce.h0`.

    Attributes:
        n_features_in_: number of coordinates d seen by fit; not set for "precomputed".

    Raises:
        ImportError: scikit-learn is not installed.
    """

    def __init__(
        self,
        metric: str = "euclidean",
        *,
        p: float | None = None,
        max_edge: float | None = None,
        backend: str | None = None,
        threads: int | None = None,
    ) -> None:
        if _MISSING is not None:
            raise ImportError(_MISSING)
        self.metric = metric
        self.p = p
        self.max_edge = max_edge
        self.backend = backend
        self.threads = threads

    def fit(self, X: Any, y: Any = None) -> H0Transformer:
        """Notes the number of coordinates.

        Args:
            X: [B, n, d], or a sequence of B clouds [n_i, d], numpy or torch; "precomputed": [B, n, n] or a sequence of
                matrices [n_i, n_i].
            y: ignored.

        Returns:
            self.

        Raises:
            TypeError: X is neither an array nor a sequence, or sparse.
            ValueError: X is one array and not three-dimensional, there is no cloud, or clouds differ in their number of
                coordinates.
        """
        clouds = _clouds(X)
        if not clouds:
            raise ValueError("X holds no cloud, expected at least one; pass [B, n, d] or a list of [n, d].")
        if self.metric == "precomputed":
            self.__dict__.pop("n_features_in_", None)
        else:
            self.n_features_in_ = int(clouds[0].shape[1])
            self._check_features(clouds)
        self._fitted = True
        return self

    def transform(self, X: Any) -> list[NDArray[Any]]:
        """The diagrams of the clouds.

        Args:
            X: as in fit; it may be empty.

        Returns:
            B arrays [n_i, 2] of (0, death), ascending, the essential class (0, inf) last, as `obce.H0.diagrams`.

        Raises:
            NotFittedError: fit was not called.
            TypeError: as fit and `obce.h0`.
            ValueError: as fit and `obce.h0`.
        """
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self)
        clouds = _clouds(X)
        self._check_features(clouds)
        out: list[NDArray[Any]] = [np.empty((0, 2))] * len(clouds)
        # Clouds of one size, type and place are one batch: padding a ragged list to its longest would cost memory.
        for indices in _alike(clouds).values():
            try:
                diagrams = self._diagrams(_stack([clouds[i] for i in indices]))
            except (TypeError, ValueError):
                for i in indices:  # again one by one, to say which cloud it is
                    self._diagrams_of_one(clouds[i], i)
                raise
            for i, diagram in zip(indices, diagrams, strict=True):
                out[i] = diagram
        return out

    def _diagrams(self, clouds: Any) -> list[NDArray[Any]]:
        keywords: dict[str, Any] = {"max_edge": self.max_edge, "backend": self.backend, "threads": self.threads}
        if self.metric == "precomputed":
            return h0_distances(clouds, **keywords).diagrams()
        return h0(clouds, metric=self.metric, p=self.p, **keywords).diagrams()

    def _diagrams_of_one(self, cloud: Any, i: int) -> None:
        try:
            self._diagrams(cloud)
        except (TypeError, ValueError) as error:
            raise type(error)(f"X[{i}]: {error}") from None

    def _check_features(self, clouds: list[Any]) -> None:
        if self.metric == "precomputed":
            return
        for i, cloud in enumerate(clouds):
            if cloud.shape[1] != self.n_features_in_:
                raise ValueError(
                    f"X[{i}] has {cloud.shape[1]} coordinates, expected {self.n_features_in_} as in fit; pass clouds "
                    "from one space."
                )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "_fitted")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        return tags


def _clouds(X: Any) -> list[Any]:
    """X as a list of two-dimensional arrays or tensors."""
    if not hasattr(X, "ndim") and hasattr(X, "__array__"):
        X = np.asarray(X)
    if type(X).__module__.startswith("scipy.sparse"):
        raise TypeError("X is a sparse matrix, expected [B, n, d] or a list of [n, d]; clouds must be dense.")
    if hasattr(X, "ndim") and X.ndim != 3:
        raise ValueError(
            f"X has {X.ndim} dimensions, expected [B, n, d] or a list of [n, d]; wrap one cloud in a list."
        )
    if not hasattr(X, "ndim") and not isinstance(X, Sequence):
        raise TypeError(f"X is a {type(X).__name__}, expected [B, n, d] or a list of [n, d].")
    clouds = [cloud if hasattr(cloud, "ndim") else np.asarray(cloud) for cloud in X]
    for i, cloud in enumerate(clouds):
        if cloud.ndim != 2:
            raise ValueError(f"X[{i}] has {cloud.ndim} dimensions, expected [n, d], one cloud; for scalars use [n, 1].")
    return clouds


def _alike(clouds: list[Any]) -> dict[tuple[Any, ...], list[int]]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for i, cloud in enumerate(clouds):
        stacks = isinstance(cloud, np.ndarray) or type(cloud).__module__.startswith("torch")
        alone = -1 if stacks else i
        key = alone, type(cloud), tuple(cloud.shape), cloud.dtype, str(getattr(cloud, "device", "cpu"))
        groups.setdefault(key, []).append(i)
    return groups


def _stack(clouds: list[Any]) -> Any:
    if len(clouds) == 1:
        return clouds[0]
    if isinstance(clouds[0], np.ndarray):
        return np.stack(clouds)
    import torch

    return torch.stack(clouds)
