"""H0Transformer: scikit-learn's contract, and the diagrams of obce.h0."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import obce
import pytest
import scipy.sparse as sp
import torch
from obce.h0 import h0, h0_distances
from scipy.sparse import csr_array
from scipy.spatial.distance import pdist, squareform

sklearn_base = pytest.importorskip("sklearn.base", reason="scikit-learn is not installed")

from sklearn.exceptions import NotFittedError  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.preprocessing import FunctionTransformer  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402


def ragged() -> list[np.ndarray]:
    g = np.random.default_rng(0)
    return [g.standard_normal((n, 3)) for n in (5, 9, 5, 1, 9, 20)]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"metric": "manhattan"}, {"metric": "minkowski", "p": 3}, {"max_edge": 0.5}, {"backend": "reference"}],
)
def test_diagrams_are_those_of_h0(keywords: dict[str, Any]) -> None:
    clouds = ragged()
    expected = [h0(cloud, **keywords).diagrams()[0] for cloud in clouds]
    same(obce.H0Transformer(**keywords).fit_transform(clouds), expected)
    batch = np.stack([clouds[0], clouds[2]])
    same(obce.H0Transformer(**keywords).fit(clouds).transform(batch), [expected[0], expected[2]])
    same(obce.H0Transformer(**keywords).fit_transform([torch.as_tensor(c) for c in clouds]), expected)
    same(obce.H0Transformer(**keywords).fit_transform([c.tolist() for c in clouds]), expected)


def test_precomputed_takes_matrices() -> None:
    matrices = [squareform(pdist(cloud)) for cloud in ragged() if len(cloud) > 1]
    expected = [h0_distances(matrix).diagrams()[0] for matrix in matrices]
    transformer = obce.H0Transformer(metric="precomputed")
    same(transformer.fit_transform(matrices), expected)
    twice = [csr_array(matrices[0]), csr_array(matrices[0])]
    same(transformer.fit_transform(twice), [expected[0], expected[0]])
    assert not hasattr(transformer, "n_features_in_")


def test_it_is_an_estimator() -> None:
    transformer = obce.H0Transformer("chebyshev", max_edge=2.0, threads=1)
    parameters = {"metric": "chebyshev", "p": None, "max_edge": 2.0, "backend": None, "threads": 1}
    assert transformer.get_params() == parameters
    twin = sklearn_base.clone(transformer.fit(ragged()))
    assert twin is not transformer and twin.get_params() == parameters
    with pytest.raises(NotFittedError):
        twin.transform(ragged())
    assert twin.set_params(max_edge=None, metric="euclidean").get_params()["max_edge"] is None
    assert "H0Transformer(max_edge=2.0" in repr(obce.H0Transformer(max_edge=2.0))
    assert sklearn_base.is_classifier(transformer) is False


def test_it_works_in_a_pipeline() -> None:
    largest = FunctionTransformer(lambda diagrams: np.array([[d[:-1, 1].max(initial=0)] for d in diagrams]))
    pipeline = make_pipeline(obce.H0Transformer(), largest)
    clouds = ragged()
    values = pipeline.fit_transform(clouds)
    assert values[:, 0].tolist() == [float(h0(cloud).r_f[0]) for cloud in clouds]
    pipeline.set_params(h0transformer__metric="manhattan")
    assert pipeline.fit(clouds).transform(clouds)[1, 0] == h0(clouds[1], metric="manhattan").r_f[0]


def test_empty_input_after_fit() -> None:
    assert obce.H0Transformer().fit(ragged()).transform([]) == []


@pytest.mark.parametrize(
    ("X", "error", "sentence"),
    [
        ([], ValueError, "X holds no cloud, expected at least one"),
        (np.zeros((4, 3)), ValueError, r"X has 2 dimensions, expected \[B, n, d\].*wrap one cloud in a list"),
        ({1, 2}, TypeError, "X is a set, expected"),
        (sp.csr_array((4, 3)), TypeError, "X is a sparse matrix, expected"),
        ([np.zeros(3)], ValueError, r"X\[0\] has 1 dimensions, expected \[n, d\]"),
        ([np.zeros((2, 3)), np.zeros((2, 2))], ValueError, r"X\[1\] has 2 coordinates, expected 3 as in fit"),
        ([np.zeros((2, 3)), np.full((4, 3), np.nan)], ValueError, r"X\[1\]: points: cloud 0, point 0 holds nan"),
        (
            np.stack([np.zeros((2, 3)), np.full((2, 3), np.inf)]),
            ValueError,
            r"X\[1\]: points: cloud 0, point 0 holds inf",
        ),
        ([np.zeros((0, 3))], ValueError, r"X\[0\]: points has clouds of 0 points"),
        ([np.array([["a"]])], TypeError, r"X\[0\]: points has dtype <U1"),
    ],
)
def test_what_is_refused(X: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        obce.H0Transformer().fit_transform(X)


class Norms(obce.H0Transformer):
    """Rows [B, d], which scikit-learn's checks speak, as clouds of two points, the row and 0; back comes the death.

    Everything else is H0Transformer's: parameters, fitted state, errors.
    """

    def fit(self, X: Any, y: Any = None) -> Norms:
        super().fit(self._clouds(X))
        return self

    def transform(self, X: Any) -> np.ndarray:
        return np.array([diagram[0, 1:] for diagram in super().transform(self._clouds(X))])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        return tags

    @staticmethod
    def _clouds(X: Any) -> Any:
        if sp.issparse(X):
            return X
        rows = np.asarray(X)
        return np.stack([rows, np.zeros_like(rows)], 1) if rows.ndim == 2 else X


NOT_OURS = {
    "check_complex_data": "fit reads shapes alone, and transform refuses by TypeError, as obce.h0; the check wants "
    "fit's ValueError in the words of check_array",
    "check_dtype_object": "obce.h0 takes no arrays of objects, even where each is a number",
    "check_estimators_empty_data_messages": "refused by transform in the words of obce.h0, not by fit in check_array's",
    "check_fit2d_predict1d": "refused, in the words of obce.h0, not of check_array",
    "check_n_features_in_after_fitting": "refused, in words of its own, not those of validate_data",
    "check_estimators_nan_inf": "fit reads shapes alone; transform refuses what is not finite, so values are read once",
}


@parametrize_with_checks([Norms()], expected_failed_checks=lambda estimator: NOT_OURS)
def test_scikit_learns_own_checks(estimator: Any, check: Any) -> None:
    check(estimator)


@parametrize_with_checks([obce.H0Transformer(), obce.H0Transformer("precomputed", max_edge=1.0)])
def test_scikit_learns_checks_that_need_no_data(estimator: Any, check: Any) -> None:
    check(estimator)


def test_anything_with_an_array_is_a_batch() -> None:
    class Holder:
        def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
            return batch if dtype is None else batch.astype(dtype)

    batch = np.random.default_rng(1).standard_normal((3, 6, 2))
    same(obce.H0Transformer().fit_transform(Holder()), obce.H0Transformer().fit_transform(batch))


def test_parameters_are_checked_when_they_are_used() -> None:
    for keywords, sentence in (({"metric": "x"}, "metric is 'x'"), ({"max_edge": -1}, "max_edge is -1")):
        with pytest.raises(ValueError, match=sentence):
            obce.H0Transformer(**keywords).fit_transform(ragged())


def test_without_sklearn_there_is_a_sentence() -> None:
    code = (
        "import sys; sys.modules['sklearn'] = None; sys.modules['sklearn.base'] = None\n"
        "from obce import *\n"
        "try:\n H0Transformer()\n"
        "except ImportError as error: assert 'H0Transformer needs scikit-learn' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )
    paths = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}\n"
    done = subprocess.run([sys.executable, "-c", paths + code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
