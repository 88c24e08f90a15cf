"""Robust accuracy that is gone is told once, where it is; noise is not."""

from typing import Any

import pytest

from robust_accel.training.collapse import falls

KEY = "validation_robust_accuracy"


def told(accuracies: list[float | None], *, held_out: int = 500, **options: Any) -> list[str]:
    key = KEY if held_out else "robust_batch_accuracy"
    about = {"labeled_images": options.pop("labeled", 640)}
    lines = [about | {"epoch": i + 1.0, key: one} for i, one in enumerate(accuracies)]
    lines.insert(1, {"epoch": 1.5, "loss": 1.0})
    options = {"after": 0, **options}
    return [fall.text for fall in falls(lines, 10, held_out=held_out, **options)]


def test_a_fall_is_told_where_it_is() -> None:
    text = "robust accuracy on the held-out split is gone: 0.00% at epoch 3, 45.00% at epoch 2"
    assert told([0.3, 0.45, 0.0, 0.0, 0.01]) == [text]
    assert told([0.3, 0.45, 0.2]) != []  # below half of it
    assert told([0.17, 0.095]) != []  # a guess's, more than half
    assert len(told([0.5, 0.0, 0.4, 0.0])) == 2  # it had come back


@pytest.mark.parametrize(
    "accuracies",
    [
        [0.1, 0.08, 0.09],  # never better than a guess
        [0.5, 0.45, 0.3],
        [0.0, 0.2, 0.3],
        [],
        [None, 0.2],
    ],
)
def test_what_is_no_fall_is_not_told(accuracies: list[float | None]) -> None:
    assert told(accuracies) == []


def test_few_images_prove_nothing() -> None:
    assert told([0.25, 0.05], held_out=20) == []
    assert told([0.25, 0.05], held_out=2000) != []
    assert told([0.8, 0.3], held_out=0, labeled=4) == []


def test_without_a_held_out_split_batches_tell_once_the_attack_is_whole() -> None:
    assert told([0.8, 0.3], held_out=0)[0].startswith("robust accuracy on training batches is gone")
    assert told([0.8, 0.3], held_out=0, after=1) == []
