"""Run folders of strangers: what they say is refused in a line, or shown and does nothing."""

import csv as csv_module
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from forked import outcome
from reporting_rows import (
    FUNCTION,
    LINF,
    NAMES,
    autoattack,
    by_class,
    certificate,
    clean,
    pgd,
    row,
    sanity,
    sweep,
    write_config,
    write_examples,
    write_run,
)
from safetensors.torch import load_file, save_file

from robust_accel.commands import say
from robust_accel.data.ids import find_rows
from robust_accel.evaluation.ledger import Ledger, read_records
from robust_accel.reporting.charts import sweep_charts
from robust_accel.reporting.exports import csv, latex
from robust_accel.reporting.figures import draw
from robust_accel.reporting.page import page
from robust_accel.reporting.report import comparison_table, write_report
from robust_accel.reporting.tables import comparison
from robust_accel.reporting.views import read_runs, refused_by_name
from robust_accel.run_folder import RunFolder

# ---- a file that is none, or holds no such text ------------------------------------------------


def sparse(file: Path) -> None:
    file.touch()
    os.truncate(file, 10 * 2**30)


def content(text: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(text)


FILES: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a device": lambda file: file.symlink_to("/dev/zero"),
    "a random device": lambda file: file.symlink_to("/dev/urandom"),
    "ten gigabytes of nothing": sparse,
    "deep": content(b"[" * 200_000 + b"\n"),
    "deep objects": content(b'{"a":' * 200_000 + b"\n"),
    "a number of many digits": content(b'{"step": ' + b"9" * 5000 + b"}\n"),
    "a list": content(b"[1]\n"),
    "a text": content(b'"text"\n'),
}


def find_ids(file: Path) -> None:
    find_rows(str(file), 10, lambda: ["a.png"] * 10, "a split")


def functions(file: Path) -> None:
    Ledger(file.parent.parent, Accelerator()).function("a", [[1.0]])


READERS: dict[str, Callable[[Path], object]] = {
    "report.json": lambda file: comparison_table([file.parent]),
    "metrics.jsonl": lambda file: RunFolder(file.parent).read_metrics(),
    "measurements.jsonl": lambda file: read_records(file.parent),
    "measurements/process-0.jsonl": lambda file: Ledger(file.parent.parent, Accelerator()).units(),
    "measurements/functions.jsonl": functions,
    "ids.txt": find_ids,
}


@pytest.mark.parametrize("name", READERS)
def test_what_is_no_such_file_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", [clean()])
    file = folder.path / name
    file.parent.mkdir(exist_ok=True)
    told = tmp_path / "told"

    def read_all() -> None:
        for kind, make in FILES.items():
            if file.is_dir():
                file.rmdir()
            file.unlink(missing_ok=True)
            make(file)
            told.write_text(kind)  # the last one, if this ends here
            with pytest.raises(ValueError) as caught:  # noqa: PT011
                READERS[name](file)
            assert str(file) in str(caught.value) or name == "ids.txt"
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 1000

    assert outcome(read_all, memory=2**30) == "done", told.read_text()


# ---- JSON of other shapes ----------------------------------------------------------------------


def broken(**about: Any) -> list[dict[str, Any]]:
    return [clean(), pgd() | about]


REPORTS: dict[str, dict[str, Any]] = {
    "measurements that are none": {"measurements": {"a": 1}},
    "a measurement that is none": {"measurements": ["text"]},
    "a measurement of nothing": {"measurements": [{}]},
    "an attack in words": {"measurements": broken(attack="pgd")},
    "an attack without a name": {"measurements": broken(attack={})},
    "an attack without steps": {"measurements": broken(attack={"name": "pgd"})},
    "images in words": {"measurements": broken(images={"n": "many"})},
    "images from a list": {"measurements": broken(images={"n": 1, "source": [1]})},
    "a threat model in words": {"measurements": broken(threat_model="linf")},
    "an eps in words": {"measurements": broken(threat_model={"norm": "linf", "eps": "8/255"})},
    "an eps without end": {"measurements": broken(threat_model={"norm": "linf", "eps": 1e308})},
    "an accuracy in words": {"measurements": broken(accuracy="high")},
    "an accuracy beyond 1": {"measurements": broken(accuracy=7)},
    "an accuracy without end": {"measurements": broken(accuracy=float("inf"))},
    "an interval of one number": {"measurements": broken(interval=[0.5])},
    "an interval in words": {"measurements": broken(interval=["a", "b"])},
    "classes of nothing": {"measurements": broken(per_class=[1, 2])},
    "a confusion of two lengths": {"measurements": broken(confusion=[[1, 2], [3]])},
    "a confusion in words": {"measurements": broken(confusion="x")},
    "a finding of nothing": {"measurements": broken(non_finite={"logits": 3})},
    "draws in a list": {"measurements": broken(seconds="long")},
    "steps of AutoAttack in words": {"measurements": [autoattack() | {"after": ["apgd"]}]},
    "a certificate without sigma": {
        "measurements": [certificate() | {"attack": {"name": "certify"}}]
    },
    "radii in words": {"measurements": [certificate() | {"radii": "many"}]},
    "a curve of two lengths": {
        "measurements": [certificate() | {"curve": {"radius": [0], "accuracy": [0.5, 0.4]}}]
    },
    "a sweep without a point": {"measurements": [row({"name": "pgd"}, LINF, 0.5, purpose="sweep")]},
    "a surface in words": {
        "measurements": [sanity() | {"surface": {"axis": ["a"], "loss": [["b"]]}}]
    },
    "a check of nothing": {"measurements": [sanity() | {"checks": [None]}]},
    "a recipe in a list": {"recipe": [1]},
    "doubts in words": {"doubts": "none"},
    "a model in words": {"model": "mine"},
    "a model of no function": {"model": {}},
    "classes that are no names": {"model": {"function": FUNCTION, "class_names": [1, {}]}},
    "versions in a list": {"versions": [1]},
    "a selection in words": {"selection": "last"},
    "seconds in words": {"train_seconds_per_epoch": "long"},
    "best against nothing": {"best_against_last": {"best": "a"}},
}


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_of_another_shape_is_refused_or_shown(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", [clean()])
    write_config(folder)
    report = folder.read_report() | REPORTS[name]
    folder.report.write_text(json.dumps(report))
    told = outcome(lambda: write_report(folder))
    assert told.startswith(("refused: ", "done"))
    if told != "done":
        assert str(folder.path) in told
        assert len(told.splitlines()) == 1
        assert len(told) < 1000
        assert not (folder.path / "report.md").exists()


def lines(*found: dict[str, Any]) -> str:
    return "".join(json.dumps(line) + "\n" for line in found)


UNIT = {"key": "k", "seconds": 1.0, "forward_passes": 1, "prediction": [1], "share": [1.0]}
UNIT |= {"chosen": [1.0], "non_finite": {}}
LINES: dict[str, tuple[str, str]] = {
    "a loss in words": ("metrics.jsonl", lines({"step": 1, "epoch": 1, "loss": "low"})),
    "a loss alone": ("metrics.jsonl", lines({"loss": 1.0})),
    "a record of nothing": ("measurements.jsonl", lines({})),
    "a record without outcomes": ("measurements.jsonl", lines(clean() | {"function": FUNCTION})),
    "outcomes in words": (
        "measurements.jsonl",
        lines(clean() | {"function": FUNCTION, "outcomes": {"image": "all"}}),
    ),
    "a unit without a key": ("measurements/process-0.jsonl", lines({"prediction": [1]})),
    "predictions in words": (
        "measurements/process-0.jsonl",
        lines(UNIT | {"prediction": ["cat"]}),
    ),
    "predictions without end": (
        "measurements/process-0.jsonl",
        lines(UNIT | {"prediction": [2**70]}),
    ),
    "shares of fewer images": ("measurements/process-0.jsonl", lines(UNIT | {"share": []})),
    "a share beyond 1": ("measurements/process-0.jsonl", lines(UNIT | {"share": [3.0]})),
    "a function of nothing": ("measurements/functions.jsonl", lines({"digest": "a"})),
    "answers in words": (
        "measurements/functions.jsonl",
        lines({"digest": "a", "function": "b", "answers": [["x"]]}),
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_of_another_shape_are_refused_by_name(tmp_path: Path, name: str) -> None:
    place, text = LINES[name]
    folder = write_run(tmp_path / "run", [clean()])
    file = folder.path / place
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    reader = (lambda _: write_report(folder)) if place == "metrics.jsonl" else READERS[place]
    told = outcome(lambda: reader(file))
    assert told.startswith("refused: ")
    assert str(folder.path) in told
    assert len(told.splitlines()) == 1


def test_an_outcome_of_another_kind_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "measurements" / "process-0.jsonl"
    file.parent.mkdir()
    file.write_text(lines({"key": "k", "seconds": 1, "forward_passes": 1}))
    with pytest.raises(ValueError, match="has no prediction"):
        _ = Ledger(tmp_path, Accelerator()).units()["k"]["prediction"]


def report(folder: RunFolder) -> None:
    """As ``write_report``, without the pictures, which take their time."""
    with refused_by_name(folder):
        page(read_runs([folder.path]))


Tensors = dict[str, torch.Tensor]
EXAMPLES: dict[str, Callable[[Path, Tensors], object]] = {
    "a pipe": lambda file, own: (file.unlink(), os.mkfifo(file)),
    "empty": lambda file, own: file.write_bytes(b""),
    "cut off": lambda file, own: file.write_bytes(file.read_bytes()[:300]),
    "no images": lambda file, own: save_file({"labels": own["labels"]}, file, ABOUT),
    "images of one number": lambda file, own: save_file(own | {"x": torch.ones(8)}, file, ABOUT),
    "fewer images": lambda file, own: save_file(own | {"x": own["x"][:2].clone()}, file, ABOUT),
    "labels of no class": lambda file, own: save_file(
        own | {"labels": torch.full((8,), 2**60)}, file, ABOUT
    ),
    "an attack that is none": lambda file, own: save_file(own, file, ABOUT | {"attack": "[1"}),
    "many images": lambda file, own: save_file(
        {key: value[:1].repeat(50_000, *[1] * (value.ndim - 1)) for key, value in own.items()},
        file,
        ABOUT,
    ),
}
ABOUT = {
    "function": FUNCTION,
    "attack": json.dumps({"name": "none"}),
    "threat_model": json.dumps(LINF),
    "selection": "first 8",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_hostile_examples_are_refused_or_shown(tmp_path: Path, name: str) -> None:
    folder = write_run(tmp_path / "run", [clean()])
    write_examples(folder)
    EXAMPLES[name](folder.examples, load_file(folder.examples))
    told = outcome(lambda: report(folder))
    shown = name in ("labels of no class", "many images")
    assert told.startswith("done" if shown else "refused: "), told
    assert shown or str(folder.path) in told


# ---- text that does something where it is shown ------------------------------------------------

ESCAPE = "\x1b]0;mine\x07\x1b[2J\x9b31m"
TEXTS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "[a](javascript:alert(1))",
    "| a | b |\n# heading\n```\n---",
    "\\input{/etc/passwd} $x$ \\write18{touch executed}",
    "=cmd|'/c calc'!A1",
    "+1+cmd",
    "@SUM(1)",
    ESCAPE,
    "\u202egnp.exe",
    "\ud800",
    "a\x00b",
    "x" * 100_000,
    "!!python/object/apply:os.system [touch executed]",
]


@pytest.fixture(scope="module")
def loud(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose every text is one of those, reported."""
    names = TEXTS[: len(NAMES)]
    every = " ".join(TEXTS)
    rows = [
        clean(**by_class(0.9, names=names), source={"path": every, "split": TEXTS[0]}),
        pgd(hardware=TEXTS[7], warnings=TEXTS, seed=TEXTS[8]),
        *(
            sanity(checks=[{"name": text, "status": text, "sentence": text, "value": {}}])
            for text in TEXTS[:1]
        ),
    ]
    folder = write_run(
        tmp_path_factory.mktemp("runs") / "loud",
        rows,
        model={"function": FUNCTION, "architecture": every, "class_names": names},
        doubts=TEXTS,
        recipe={"model": {"name": every}, "data": {"path": TEXTS[0]}, "attack": {"name": every}},
        versions={text: text for text in TEXTS},
        parameters_digest=every,
        selection={"weights": every},
    )
    write_config(folder, model_args={"act_layer": TEXTS[1], TEXTS[0]: 1})
    write_report(folder)
    return folder


def test_the_page_holds_no_markup_of_a_stranger(loud: RunFolder) -> None:
    text = (loud.path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in text
    for markup in ("<script>alert", "<img src=x", "\x1b", "\u202e", "\x00"):
        assert markup not in text
    assert "{{ 7 * 7 }}" in text
    other = write_run(loud.path.parent / "other", [clean()])
    assert text.count("</script>") == page(read_runs([other.path])).count("</script>")


@pytest.mark.parametrize("place", ["report.md", "model/README.md"])
def test_markdown_holds_no_markup_of_a_stranger(loud: RunFolder, place: str) -> None:
    text = (loud.path / place).read_text()
    shown, *blocks = text.split("`yaml\n")
    if place == "model/README.md":
        metadata, _, shown = shown.removeprefix("---\n").partition("\n---\n")
        assert yaml.safe_load(metadata)["library_name"] == "robust-accel"
    assert len(blocks) == 1
    for markup in ("<script", "<img", "](javascript", "\n# heading", "\x1b", "\u202e", "\x00"):
        assert markup not in shown
    fence = blocks[0].rsplit("\n", 2)[-2]
    assert set(fence) == {"`"}
    assert fence not in blocks[0].removesuffix(fence + "\n").splitlines()


def test_exports_hold_nothing_that_is_executed(loud: RunFolder) -> None:
    runs = read_runs([loud.path])
    cells = [cell for line in csv_module.reader(io.StringIO(csv(runs))) for cell in line]
    assert any(cell.startswith("'=cmd") for cell in cells)
    for cell in cells:
        assert not cell.startswith(("=", "+", "@", "\t", "\r"))
        assert not cell.startswith("-") or float(cell) < 0
    text = latex(comparison(runs))
    assert "\\input" not in text
    assert "\\write" not in text


def test_the_terminal_is_not_obeyed(loud: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    say(comparison_table([loud.path]) + ESCAPE)
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "\x9b" not in told
    assert "\x07" not in told


def test_pictures_stay_in_their_folder(tmp_path: Path) -> None:
    """Their names hold norms and keys of the ledger."""
    up = "/../../../../victim"
    point = sweep({"norm": up, "eps": 0.1})[0]
    rows = [point, point | {"point": {"key": up, "value": 0.1}}]
    run = write_run(tmp_path / "a" / "run", rows)
    for chart in sweep_charts(*read_runs([run.path])):
        draw(chart, run.path / "figures")
    inside = {path for path in tmp_path.rglob("*") if run.path in path.parents}
    assert {*tmp_path.rglob("*")} - inside == {tmp_path / "a", run.path}
    assert len(list((run.path / "figures").iterdir())) == 4
