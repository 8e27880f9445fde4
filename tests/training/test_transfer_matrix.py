"""The numbers that are read off a transfer matrix, by hand."""

from __future__ import annotations

import math

import pytest

from cl_fast.training.metrics import TransferMatrix


def matrix() -> TransferMatrix:
    return TransferMatrix(["a", "b"], [0.3, 0.05], [[0.9, 0.1], [0.6, 0.8]])


def test_two_tasks_by_hand() -> None:
    found = matrix()
    assert found.average == pytest.approx(0.7)
    assert found.backward == pytest.approx(-0.3)
    assert found.forgetting == pytest.approx(0.3)
    assert found.forward == pytest.approx(0.1 - 0.05)
    assert found.learning_accuracy == pytest.approx(0.85)
    assert found.intransigence({"a": 0.95, "b": 0.9}) == pytest.approx(0.075)


def test_forgetting_is_from_the_best_score_and_transfer_from_the_first() -> None:
    rows = [[0.5, 0.2, 0.1], [0.7, 0.6, 0.3], [0.4, 0.5, 0.9]]
    found = TransferMatrix(["a", "b", "c"], [0.1, 0.1, 0.1], rows)
    assert found.backward == pytest.approx(((0.4 - 0.5) + (0.5 - 0.6)) / 2)
    assert found.forgetting == pytest.approx(((0.7 - 0.4) + (0.6 - 0.5)) / 2)
    assert found.forward == pytest.approx(((0.2 - 0.1) + (0.3 - 0.1)) / 2)


def test_what_was_not_measured_is_nan_and_no_zero() -> None:
    found = TransferMatrix(["a", "b"])
    assert math.isnan(found.average)
    found.add({"a": 0.9})
    assert math.isnan(found.backward)
    found.add({"a": 0.6, "b": 0.8})
    assert found.backward == pytest.approx(-0.3)
    assert math.isnan(found.forward)  # neither b before the training, nor b after a


def test_one_task_has_no_transfer() -> None:
    found = TransferMatrix(["a"], [0.1], [[0.9]])
    assert found.average == 0.9
    assert math.isnan(found.backward)
    assert math.isnan(found.forgetting)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TransferMatrix(["a", "a"]), "names of their own"),
        (lambda: TransferMatrix(["a"], [1.0, 2.0]), "1 scores; got 2"),
        (lambda: TransferMatrix(["a"], rows=[[1.0], [1.0]]), "more than the 1"),
        (lambda: TransferMatrix(["a"]).add({"b": 1.0}), "no task 'b'"),
        (lambda: matrix().add({"a": 1.0}), "their row already"),
        (lambda: matrix().intransigence({"a": 1.0}), "lacks 'b'"),
    ],
)
def test_bad_input(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]
