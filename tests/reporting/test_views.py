"""How numbers are written, and which rows are quoted."""

from itertools import permutations
from pathlib import Path

import pytest
from reporting_rows import L2, LINF, autoattack, certificate, clean, pgd, write_run

from robust_accel.reporting.views import (
    accuracy_text,
    cell,
    difference,
    pick,
    quoted,
    read_runs,
    same_attack,
)
from robust_accel.settings import eps_text


@pytest.mark.parametrize("levels", [1, 2, 4, 8, 16, 50, 52, 128, 254])
def test_multiples_of_a_pixel_level_are_written_as_such(levels: int) -> None:
    assert eps_text(levels / 255) == f"{levels}/255"
    assert eps_text(float(f"{levels / 255:.8g}")) == f"{levels}/255"  # as fp32 would have it


def test_any_other_eps_has_four_digits() -> None:
    assert [eps_text(eps) for eps in (0.3, 0.03137, 0.123456, 0.25)] == [
        "0.3", "0.03137", "0.1235", "0.25",
    ]  # fmt: skip
    # multiples of 51/255, which nobody writes so
    assert [eps_text(eps) for eps in (0.2, 0.4, 1.0, 2.0)] == ["0.2", "0.4", "1", "2"]


def test_a_difference_has_newcombes_interval() -> None:
    # 56 of 70 against 48 of 80: table II of Newcombe 1998, method 10
    one, other = pgd(56 / 70, 70), pgd(48 / 80, 80)
    assert difference(one, other) == pytest.approx((0.2, 0.0524, 0.3339), abs=1e-4)
    assert difference(one, one)[0] == 0


def test_pgd_is_quoted_of_the_most_images_and_then_of_the_most_steps() -> None:
    rows = [pgd(0.5, 100, steps=100), pgd(0.5, 200), pgd(0.5, 200, restarts=5), pgd(0.5, 200)]
    for order in permutations(rows):
        assert pick(order) is rows[2]
    assert pick([]) is None


def test_autoattack_is_quoted_by_its_version_and_then_of_the_most_images() -> None:
    rows = [
        autoattack(n=1000, version="quick"),
        autoattack(n=500, version="rand"),
        autoattack(n=100),
        autoattack(n=200),
    ]
    for order in permutations(rows):
        assert pick(order) is rows[3]


def test_each_threat_model_and_each_set_of_images_is_an_entry(tmp_path: Path) -> None:
    other = {"path": "corrupted", "split": "test"}
    rows = [clean(), pgd(0.7), pgd(0.6, threat=L2), pgd(0.1, source=other), certificate()]
    (run,) = read_runs([write_run(tmp_path / "run", rows).path])
    found = quoted(run)
    assert [(e.source, e.threat) for e in found] == [
        ("sklearn:digits test", LINF),
        ("sklearn:digits test", L2),
        ("corrupted test", LINF),
    ]
    assert [e.clean for e in found] == [rows[0], rows[0], None]  # other images
    assert [e.pgd for e in found] == [rows[1], rows[2], rows[3]]
    assert [e.certified and e.certified[1]["radius"] for e in found] == [None, 0.5, None]


def test_a_radius_out_of_reach_is_no_number(tmp_path: Path) -> None:
    far = certificate()
    far["radii"][-2] |= {"reachable": False}  # of radius 0.5, that was attacked
    rows = [clean(), pgd(0.6, threat=L2), far]
    (run,) = read_runs([write_run(tmp_path / "run", rows).path])
    assert [entry.certified and entry.certified[1]["radius"] for entry in quoted(run)] == [
        None,
        0.2,
    ]


def test_a_certificate_of_no_eps_that_was_attacked_is_an_entry_of_its_own(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "run", [clean(), pgd(), certificate()]).path])
    assert [e.threat for e in quoted(run)] == [LINF, {"norm": "l2", "eps": 0.2}]


def test_a_cell_says_how_many_draws_and_what_was_not_finite() -> None:
    row = pgd(0.5, 100, draws=20, non_finite={"logits": [1, 2], "gradients": [2]})
    about = "PGD-20, n=100, mean of 20 draws, 2 images met NaN or Inf"
    assert cell(row) == f"50.00 [40.38, 59.62] ({about})"
    assert cell(clean(1.0, 10)) == "100.00 [72.25, 100.00] (n=10)"
    assert cell(None) == "not measured"
    assert accuracy_text(certificate()) == ""


def test_the_same_attack_has_the_same_settings_and_threat_model() -> None:
    row = pgd(0.9, purpose="train")
    others = [pgd(threat=L2), pgd(steps=10), pgd(restarts=2), clean()]
    assert same_attack(row, others) is None
    assert same_attack(row, [*others, twin := pgd(0.4)]) is twin


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name, [clean()]).path for name in ("a/run", "b/run", "c/other")]
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "other"]
