"""Titles, captions and names say which images they are of; drawing leaves matplotlib as it was."""

import json
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot
from reporting_rows import (
    DIGITS,
    autoattack,
    by_class,
    certificate,
    clean,
    pgd,
    sanity,
    sweep,
    write_examples,
    write_run,
)

from robust_accel.reporting.charts import Lines
from robust_accel.reporting.figures import draw
from robust_accel.reporting.sections import sections
from robust_accel.reporting.views import Run, read_runs
from robust_accel.run_folder import RunFolder

ELSEWHERE = {"path": "elsewhere", "split": "test"}
OF = "of sklearn:digits test"
RANDOMIZED = {"draws": 20, "warnings": ["it seems random"], "non_finite": {"logits": [3]}}


def shown(folder: RunFolder) -> dict[str, list[str]]:
    """Captions, titles and names of single curves by the section that they stand in."""
    found: dict[str, list[str]] = {}
    (run,) = read_runs([folder.path])
    for section in sections(run):
        texts = [chart.title for chart in section.charts]
        texts += [table.caption for table in section.tables if table.caption]
        found[section.title] = [*texts, *section.texts]
    return found


ABOUT_IMAGES = (
    "Numbers that were not finite",
    "AutoAttack, attack by attack",
    "Warnings of the attacks",
    "Certified accuracy",
    "Accuracy against eps and steps",
    "Adversarial images, with predictions",
    "Classes",
    "Is the number too good?",
)


def test_where_several_sets_of_images_were_measured_on_each_caption_says_which(
    tmp_path: Path,
) -> None:
    rows = [clean(), pgd(0.7, **RANDOMIZED, **by_class(0.7)), autoattack(), *sweep()]
    rows += [certificate(), sanity()]
    one = write_run(tmp_path / "one", rows)
    several = write_run(tmp_path / "several", [*rows, clean(0.1, source=ELSEWHERE)])
    for folder in (one, several):
        write_examples(folder, source=json.dumps(DIGITS))
    found, alone = shown(several), shown(one)
    for title in ABOUT_IMAGES:
        assert found[title] and all(OF in text for text in found[title]), title
        assert not any("of sklearn" in text for text in alone[title]), title


def test_sets_of_one_source_are_told_apart_by_their_selection(tmp_path: Path) -> None:
    rows = [certificate(), certificate(selection="first 100 of ids of hard")]
    for number, row in enumerate(rows):
        row["images"]["first"] = str(number)
    (run,) = read_runs([write_run(tmp_path / "run", rows).path])
    names = certified_names(run)
    assert names[0].endswith("100 images of sklearn:digits test, first 100")
    assert names[1].endswith("100 images of sklearn:digits test, first 100 of ids of hard")


def certified_names(run: Run) -> list[str]:
    charts = [chart for section in sections(run) for chart in section.charts]
    (chart,) = [chart for chart in charts if chart.name == "certified"]
    assert isinstance(chart, Lines)
    return [line.name for line in chart.lines]


@pytest.fixture
def backend() -> Iterator[str]:
    """One that a notebook's user may have chosen."""
    before = matplotlib.get_backend()
    matplotlib.use("pdf")
    yield "pdf"
    matplotlib.use(before)


def test_drawing_keeps_the_users_backend_and_figures(tmp_path: Path, backend: str) -> None:
    own = pyplot.figure()
    folder = write_run(tmp_path / "run", [certificate()])
    (chart,) = [c for s in sections(*read_runs([folder.path])) for c in s.charts]
    assert draw(chart, tmp_path).stat().st_size > 0
    assert matplotlib.get_backend() == backend
    assert pyplot.get_fignums() == [own.number]
    pyplot.close(own)
