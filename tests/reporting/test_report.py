"""report.md and the comparison: rows of measurements, each with its own images and attack."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from reporting_rows import (
    DIGITS,
    L2,
    MODEL,
    RECIPE,
    autoattack,
    by_class,
    certificate,
    clean,
    pgd,
    row,
    sweep,
    write_examples,
    write_run,
    write_whole,
)
from safetensors.torch import load_file, save_file

from robust_accel.reporting.charts import Lines, certified_chart, examples, sweep_charts
from robust_accel.reporting.report import certified_table, comparison_table, write_report
from robust_accel.reporting.views import read_runs
from robust_accel.run_folder import RunFolder


def cells(table: str) -> list[list[str]]:
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_runs_stand_side_by_side_a_row_a_threat_model(tmp_path: Path) -> None:
    rows = [clean(0.8, 400), pgd(0.5, 400), autoattack((0.8, 0.25), 200), pgd(0.4, 100, L2)]
    write_run(tmp_path / "robust", rows)
    write_run(tmp_path / "plain", [clean(0.9, 400)], trained=False)
    table = comparison_table([tmp_path / "robust", tmp_path / "plain"])
    head, rule, linf, l2, plain = cells(table)
    assert head == [
        "run", "threat model", "clean (%)", "PGD (%)", "AutoAttack (%)", "s/epoch",
    ]  # fmt: skip
    assert all(set(cell) == {"-"} for cell in rule)
    assert linf == [
        "robust", "linf, eps 8/255", "80.00 [75.80, 83.63] (n=400)",
        "50.00 [45.12, 54.88] (PGD-20, n=400)", "25.00 [19.51, 31.43] (standard, n=200)", "12.3",
    ]  # fmt: skip
    assert l2[:2] == ["robust", "l2, eps 0.5"]
    assert l2[3:5] == ["40.00 [30.94, 49.80] (PGD-20, n=100)", "not measured"]
    assert plain[1:] == ["", "90.00 [86.67, 92.57] (n=400)", "not measured", "not measured", ""]
    assert len({len(line) for line in table.splitlines()}) == 1  # aligned for plain eyes too


def test_certified_accuracy_and_other_images_get_columns_where_there_are_any(
    tmp_path: Path,
) -> None:
    other = {"path": "corrupted", "split": "test"}
    write_run(tmp_path / "run", [clean(), pgd(0.6, 360, L2), certificate(), clean(source=other)])
    head, _, first, second = cells(comparison_table([tmp_path / "run"]))
    assert head[1] == "images of" and head[-2] == "certified (%)"
    assert first[-2] == "71.00 [61.46, 78.99] (cohen, sigma 0.25, n=100)"  # at radius 0.5
    assert second[1] == "corrupted test"


def seed_run(path: Path, seed: int, *rows: dict[str, Any], **train: Any) -> Path:
    recipe = RECIPE | {"train": {"seed": seed, "lr": 1} | train, "output": str(path)}
    write_run(path, list(rows), recipe=recipe)
    return path


def test_runs_of_several_seeds_get_a_mean_with_its_interval(tmp_path: Path) -> None:
    paths = [
        seed_run(tmp_path / str(seed), seed, clean(), pgd(share, 100), pgd(0.3, 100, L2))
        for seed, share in enumerate((0.50, 0.52, 0.54))
    ]
    other = seed_run(tmp_path / "3", 3, pgd(0.9, 100), lr=2)
    lines = cells(comparison_table([*paths, paths[0], other]))  # one is named twice
    means = [line for line in lines if line[0].startswith("mean")]
    assert [line[:2] for line in means] == [
        ["mean of 3", "linf, eps 8/255"],
        ["mean of 3", "l2, eps 0.5"],
    ]
    # standard error 2 / sqrt(3), t(0.975, 2) = 4.302653
    assert means[0][3] == "52.00 +- 4.97 (3 seeds, t-interval)"
    assert means[0][4] == ""


@pytest.mark.parametrize("second", [pgd(0.6, 200), pgd(0.6, 100, steps=50)])
def test_a_mean_is_of_the_same_attack_on_as_many_images(
    tmp_path: Path, second: dict[str, Any]
) -> None:
    paths = [seed_run(tmp_path / "0", 0, pgd(0.5, 100)), seed_run(tmp_path / "1", 1, second)]
    assert cells(comparison_table(paths))[-1][3] == "attacks or images differ"


@pytest.mark.long
def test_the_report_holds_every_row_fact_and_picture(tmp_path: Path) -> None:
    folder = write_whole(tmp_path / "robust")
    rows = folder.read_report()["measurements"]
    text = write_report(folder)
    assert (folder.path / "report.md").read_text() == text
    assert text.startswith("# robust\n")
    assert comparison_table([folder.path]) in text
    assert len(cells(section(text, "Measurements"))) == len(rows) + 2
    pictures = [line.split("](")[1][:-1] for line in text.splitlines() if line.startswith("![")]
    assert len(pictures) == 12
    for name in pictures:
        with Image.open(folder.path / name) as figure:
            assert len(figure.convert("RGB").getcolors(1 << 24)) > 10  # no blank sheet
        assert (folder.path / name).with_suffix(".svg").read_text().startswith("<?xml")
    for title in ("Doubts", "Warnings of the attacks", "Is the number too good?"):
        assert section(text, title)
    assert "3 images met NaN or Inf" in section(text, "Numbers that were not finite")
    assert "| apgd-ce                | 73.00        | 50" in section(
        text, "AutoAttack, attack by attack"
    )
    assert "59.00 [49.20, 68.13] | 62.00" in section(text, "A randomised model")
    gaps = cells(section(text, "Training images against test images"))
    assert [line[-1] for line in gaps[2:]] == ["2.50 [0.77, 4.68]", "18.00 [12.56, 23.29]"]
    assert "best (epoch 12)" in section(text, "Best weights against last")
    assert "| normalization.mean" in section(text, "How it was made")
    assert "  num_steps: 7\n" in section(text, "Recipe")


def test_training_images_are_compared_with_test_images_of_their_set(tmp_path: Path) -> None:
    other = {"path": "elsewhere", "split": "test"}
    trained = clean(0.9, 300, purpose="train", source=DIGITS | {"split": "train"})
    folder = write_run(tmp_path / "run", [trained, clean(0.8, 360), clean(0.1, 1000, source=other)])
    gaps = cells(section(write_report(folder), "Training images against test images"))
    assert [line[-1].split()[0] for line in gaps[2:]] == ["10.00"]


def test_without_training_there_are_no_curves_of_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "measured_only", [clean()], trained=False)
    text = write_report(folder)
    assert "## Training" not in text and "## Recipe" not in text
    assert not (folder.path / "figures").exists()


def test_a_run_that_was_trained_but_not_measured_is_told_as_such(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", measurements=None, model=None)
    assert "not measured" in write_report(folder)


def test_a_run_without_report_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "robust")
    with pytest.raises(ValueError, match=r"other: no such folder"):
        comparison_table([tmp_path / "robust", tmp_path / "other"])
    with pytest.raises(ValueError, match=r"other: no such folder"):
        write_report(RunFolder(tmp_path / "other"))


def test_names_of_strangers_are_text_in_markdown(tmp_path: Path) -> None:
    source = {"path": "a|b<script>alert(1)</script>", "split": "[x](http://y)"}
    write_run(tmp_path / "run", [clean(source=source), clean()])
    table = comparison_table([tmp_path / "run"])
    assert "a\\|b&lt;script>" in table and "<script" not in table and "](" not in table


def test_worst_classes_come_first_by_name(tmp_path: Path) -> None:
    classes = [{"class": i, "name": None, "n": 10, "accuracy": 1 - i / 40} for i in range(30)]
    names = [f"class {i}" for i in range(30)]
    folder = write_run(
        tmp_path / "run", [pgd(per_class=classes)], model=MODEL | {"class_names": names}
    )
    lines = cells(section(write_report(folder), "Classes"))
    assert [line[0] for line in lines[2:]] == [f"class {i}" for i in range(29, 19, -1)]
    assert "the 10 worst of 30 classes" in (folder.path / "report.md").read_text()


def test_classes_of_clean_images_alone_are_told_once(tmp_path: Path) -> None:
    rows = [clean(**by_class(0.9)), pgd(), pgd(0.3, threat=L2)]
    folder = write_run(tmp_path / "run", rows)
    lines = cells(section(write_report(folder), "Classes"))
    assert len(lines) == 12 and lines[0] == ["class", "clean (%)"]


def test_certified_table_is_there_for_the_command() -> None:
    lines = certified_table({"measurements": [clean(), certificate()]})
    assert "sigma 0.25" in lines[0] and "100 images" in lines[0]
    assert ["0.5", "71.00", "[61.46, 78.99]"] in cells("\n".join(lines))
    assert certified_table({"measurements": [clean()]}) == []


def test_a_certified_curve_ends_where_it_is_known(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [certificate()])
    (chart,) = certified_chart(*read_runs([tmp_path / "run"]))
    assert isinstance(chart, Lines)
    (line,) = chart.lines
    assert max(line.x) == 0.8 and line.y[-1] > 40
    assert all(low <= y <= high for low, y, high in zip(line.low, line.y, line.high, strict=True))


def test_sweeps_of_two_norms_are_two_charts_and_of_two_attacks_two_lines(tmp_path: Path) -> None:
    rows = [*sweep(), *sweep(L2), *(r | {"attack": r["attack"] | {"restarts": 5}} for r in sweep())]
    write_run(tmp_path / "run", rows)
    charts = {c.name: c for c in sweep_charts(*read_runs([tmp_path / "run"]))}
    found = {name: len(c.lines) for name, c in charts.items() if isinstance(c, Lines)}
    assert found == {"sweep_eps_linf": 2, "sweep_steps": 3, "sweep_eps_l2": 1}
    line = charts["sweep_eps_linf"].lines[0]  # type: ignore[union-attr]
    assert list(line.x) == pytest.approx([0, 2, 4, 6, 8, 10])  # in levels, from the clean images on
    assert list(line.y) == pytest.approx([97.5, 93, 86, 75, 50, 21])


def test_sweeps_by_different_attacks_are_told_apart_by_name(tmp_path: Path) -> None:
    others = [{"restarts": 5}, {"name": "apgd"}, {"loss": "cw"}, {"random_start": False}]
    rows = [*sweep(), *(r | {"attack": r["attack"] | other} for other in others for r in sweep())]
    write_run(tmp_path / "run", rows)
    charts = {c.name: c for c in sweep_charts(*read_runs([tmp_path / "run"]))}
    for name in ("sweep_eps_linf", "sweep_steps"):
        chart = charts[name]
        assert isinstance(chart, Lines)
        assert len({line.name for line in chart.lines}) == len(chart.lines) == 5
    steps = charts["sweep_steps"]
    assert isinstance(steps, Lines) and steps.x_label == "steps"
    names = [line.name for line in steps.lines]
    assert names[1:4] == [f"{a}, linf, eps 8/255, 200 images" for a in ("PGD x5", "APGD", "PGD CW")]


def test_images_are_shown_of_the_model_that_was_measured_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [clean()])
    write_examples(folder)
    (chart,) = examples(*read_runs([folder.path]))
    assert chart.title == "run: PGD-20, linf, eps 8/255; first 8 images, right or not"
    assert chart.magnification == 8  # 8 * 8/255 is the largest doubling below a half
    write_examples(folder, function="another")
    assert examples(*read_runs([folder.path])) == []
    folder.write_report(json.loads(folder.report.read_text()) | {"model": None})
    found = load_file(folder.examples)
    save_file(found, folder.examples)  # as before there was a ledger: of who knows what
    assert examples(*read_runs([folder.path])) == []


def test_an_attack_that_no_view_knows_is_still_a_measurement(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [row({"name": "square", "num_queries": 500}, L2, 0.5)])
    lines = cells(section(write_report(folder), "Measurements"))
    assert lines[-1][1:4] == ["square", "num_queries 500", "l2, eps 0.5"]
