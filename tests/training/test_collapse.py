"""Robust accuracy that is gone is told once, where it is; noise is not."""

from typing import Any

import numpy as np
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


def watched(robust: list[float], one_step: list[float], *, held_out: int = 500) -> list[str]:
    pairs = zip(robust, one_step, strict=True)
    lines = [
        {"epoch": i + 1.0, KEY: p, "validation_one_step_accuracy": q}
        for i, (p, q) in enumerate(pairs)
    ]
    return [fall.text for fall in falls(lines, 10, held_out=held_out, after=0)]


def test_one_step_accuracy_tells_of_a_fall_that_is_no_loss_yet() -> None:
    text = (
        "robust accuracy on the held-out split falls away from that after one step (catastrophic "
        "overfitting): 30.00% (after one step 60.00%) at epoch 3, 45.00% (after one step 55.00%) "
        "at epoch 2"
    )
    assert watched([0.3, 0.45, 0.3, 0.2], [0.4, 0.55, 0.6, 0.9]) == [text]
    assert told([0.3, 0.45, 0.3]) == []
    assert watched([0.3, 0.45, 0.3], [0.4, 0.55, 0.5]) == []  # both fall
    assert watched([0.3, 0.45, 0.36], [0.4, 0.55, 0.6]) == []  # as by robust overfitting
    assert watched([0.3, 0.45, 0.3], [0.4, 0.55, 0.6], held_out=60) == []
    (gone,) = watched([0.3, 0.45, 0.0], [0.4, 0.55, 0.9])
    assert "is gone: 0.00% (after one step 90.00%)" in gone


def test_a_gap_that_opens_is_told() -> None:
    """Though one step has lost some, too."""
    curves = [0.2, 0.3, 0.17], [0.3, 0.42, 0.4]
    assert len(watched(*curves, held_out=2000)) == 1
    assert watched(*curves, held_out=100) == []
    assert watched([0.17, 0.17], [0.2, 0.4], held_out=2000) == []  # PGD's has not fallen
    assert watched([0.3, 0.17], [0.05, 0.0], held_out=2000) == []


@pytest.mark.parametrize("n", [400, 1000, 5000])
@pytest.mark.parametrize("shape", ["steady", "noisy", "overfitting"])
@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_an_ordinary_training_raises_no_alarm(n: int, shape: str, share: float) -> None:
    """Accuracies of 60 epochs, drawn image by image anew in each: more chance than there is.

    In a hard threat model PGD leaves little of what one step leaves, from the beginning.
    """
    draw, epochs = np.random.default_rng(n), np.arange(60)
    for _ in range(8):
        grown = 1 - np.exp(-(epochs + 1) / 5)
        one_step, kept = 0.58 * grown, np.full(60, share)  # PGD leaves of what one step leaves
        if shape == "noisy":  # a high rate: some epochs are worse, for both
            one_step = one_step * draw.uniform(0.85, 1, 60)
        if shape == "overfitting":  # robust accuracy falls by a fifth: from 53 to 43%
            late = np.clip((epochs - 30) / 20, 0, 1)
            one_step, kept = one_step - 0.025 * late, kept * (1 - 0.13 * late)
        passed = draw.binomial(n, one_step)
        robust = draw.binomial(passed, kept)
        assert watched((robust / n).tolist(), (passed / n).tolist(), held_out=n) == []


@pytest.mark.parametrize("n", [300, 1000])
@pytest.mark.parametrize("epochs_of_falling", [1, 3, 8])
@pytest.mark.parametrize("share", [0.88, 0.4])
def test_catastrophic_overfitting_is_told_before_all_is_lost(
    n: int, epochs_of_falling: int, share: float
) -> None:
    draw = np.random.default_rng(n)
    late = np.clip((np.arange(30) - 14) / epochs_of_falling, 0, 1)
    passed = draw.binomial(n, 0.5 + 0.35 * late)
    robust = draw.binomial(passed, share * (1 - late))
    lines = [
        {"epoch": i, KEY: p / n, "validation_one_step_accuracy": q / n}
        for i, (p, q) in enumerate(zip(robust.tolist(), passed.tolist(), strict=True))
    ]
    (fall,) = falls(lines, 10, held_out=n, after=0)
    assert fall.lasts and 15 <= fall.epoch <= 14 + (epochs_of_falling + 1) // 2


def test_raw_weights_count_where_averaged_ones_are_measured() -> None:
    raw = "validation_raw_{}".format
    lines = [
        {"epoch": i + 1.0, KEY: 0.5, raw("robust_accuracy"): p, raw("images"): 500}
        for i, p in enumerate((0.4, 0.45, 0.0))
    ]
    lines.insert(0, {"epoch": 0.5, KEY: 0.9})  # of a version that did not measure them
    (fall,) = falls(lines, 10, held_out=5000, after=0)
    assert (fall.epoch, fall.lasts) == (3.0, True)
    few = [line | {raw("images"): 5} for line in lines]
    assert falls(few, 10, held_out=5000, after=0) == []


def test_whether_it_came_back_is_known() -> None:
    lines = [{"epoch": i, KEY: p} for i, p in enumerate((0.5, 0.0, 0.4, 0.1))]
    assert [fall.lasts for fall in falls(lines, 10, held_out=500, after=0)] == [False, True]
    assert not falls(lines[:3], 10, held_out=500, after=0)[0].lasts


def test_a_real_training_that_goes_well_raises_none() -> None:
    """Of the quickstart's network by one step of 0.25 in 30 epochs, 400 images held out.

    At first PGD leaves much less than one step does, and nothing was lost.
    """
    robust = (
        1.0, 6.2, 11.5, 10.5, 18.2, 20.5, 27.5, 29.8, 32.2, 33.0, 33.5, 35.0, 33.8, 37.0, 32.2,
        40.5, 35.8, 41.8, 41.5, 40.5, 43.5, 40.0, 45.2, 44.5, 40.0, 44.2, 46.8, 45.8, 46.5, 47.8,
    )  # fmt: skip
    one_step = (
        9.5, 23.0, 33.2, 33.2, 43.8, 46.5, 50.5, 53.2, 54.2, 54.2, 59.2, 58.5, 59.5, 63.0, 61.5,
        64.8, 65.2, 65.5, 65.8, 67.0, 67.0, 64.8, 69.0, 67.2, 65.5, 64.2, 69.0, 69.0, 69.0, 69.5,
    )  # fmt: skip
    pairs = ([share / 100 for share in curve] for curve in (robust, one_step))
    assert watched(*pairs, held_out=400) == []
