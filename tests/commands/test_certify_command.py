"""The certify command: the log it writes, how it goes on, and what it refuses."""

import csv
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from robust_accel.__main__ import main
from robust_accel.commands.certify import certify_model
from robust_accel.evaluation.certify import SmoothedClassifier
from robust_accel.evaluation.certify_images import COLUMNS
from robust_accel.recipe import load_recipe
from robust_accel.training.run import train

SETTINGS = ("certify.sigma=0.1", "certify.n=500", "certify.images=8", "certify.skip=3")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    settings = ["train.epochs=2", "attack.num_steps=1", "attack.step_size=0.1"]
    settings += ["data.train_size=600", "evaluate.autoattack=null", "evaluate.pgd=null"]
    train(load_recipe("quickstart", [*settings, f"output={folder}"]), quiet=True)
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "certify" / "certify.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def without_time(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k != "time"} for row in rows(folder)]


@pytest.mark.parametrize("method", ["cohen", "sequential"])
def test_the_fields_log_a_table_and_a_plot(run: Path, tmp_path: Path, method: str) -> None:
    output = f"output={tmp_path / 'certified'}"
    folder = certify_model(str(run), [*SETTINGS, output, f"certify.method={method}"])
    found = rows(folder.path)
    assert tuple(found[0]) == COLUMNS
    assert [int(row["idx"]) for row in found] == list(range(0, 24, 3))
    for row in found:
        radius, predict = float(row["radius"]), int(row["predict"])
        assert (predict == -1) == (radius == 0)
        assert row["correct"] == str(int(predict == int(row["label"])))
    report = folder.read_report()["certified"]
    assert report["images"] == 8
    at = {point["radius"]: point["accuracy"] for point in report["accuracy"]}
    right = [float(r["radius"]) >= 0.05 and r["correct"] == "1" for r in found]
    assert at[0.05] == pytest.approx(sum(right) / 8)
    assert at[0.05] > 0 and at[0.5] == 0
    most = {"cohen": 600, "sequential": 599}[method]
    assert report["samples_per_image"] <= most
    assert "certified.png" in (folder.path / "report.md").read_text()
    assert (folder.path / "certified.png").exists()


class Killed(Exception):
    pass


def test_killed_it_goes_on_and_writes_the_same_log(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = certify_model(str(run), [*SETTINGS, f"output={tmp_path / 'whole'}"])
    certify, calls = SmoothedClassifier.certify, 0

    def deadly(*arguments, **options):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise Killed
        return certify(*arguments, **options)

    monkeypatch.setattr(SmoothedClassifier, "certify", deadly)
    killed = [*SETTINGS, f"output={tmp_path / 'killed'}"]
    with pytest.raises(Killed):
        certify_model(str(run), killed)
    (part,) = (tmp_path / "killed" / "certify").glob("process-*.jsonl")
    with part.open("a") as file:
        file.write('{"idx": 9, "label"')
    certify_model(str(run), killed)
    assert calls == 4 + 5
    assert without_time(tmp_path / "killed") == without_time(whole.path)
    certify_model(str(run), killed)  # nothing is left to do
    assert calls == 9
    more = certify_model(str(run), [*killed, "certify.images=10"])
    assert calls == 11 and len(rows(more.path)) == 10


def test_a_log_of_something_else_stays_as_it_was(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"output={tmp_path / 'certified'}"
    certify_model(str(run), [*SETTINGS, output])
    kept = {p.name: p.read_bytes() for p in (tmp_path / "certified" / "certify").iterdir()}
    for change in ("certify.sigma=0.2", "certify.seed=1", "certify.n=600", "certify.alpha=0.01"):
        assert main(["certify", str(run), *SETTINGS, output, change]) == 2
        error = capsys.readouterr().err
        assert "holds another certification" in error
        assert change.removeprefix("certify.").split("=")[0] in error
    weights = load_file(run / "model" / "model.safetensors")
    changed = tmp_path / "other"
    shutil.copytree(run, changed)
    key = next(key for key in weights if key.endswith("bias"))
    save_file(weights | {key: weights[key] + 1}, changed / "model" / "model.safetensors")
    assert main(["certify", str(changed), *SETTINGS, output]) == 2
    assert "model: " in capsys.readouterr().err
    now = {p.name: p.read_bytes() for p in (tmp_path / "certified" / "certify").iterdir()}
    assert now == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), r"certify.sigma: missing: the objective has no sigma"),
        (("certify.sigma=0",), r"certify.sigma: 0 is not allowed"),
        (("certify.sigma=0.1", "certify.alpha=1"), r"certify.alpha: 1 is not allowed"),
        (("certify.sigma=0.1", "certify.n=50"), r"n: 50 is fewer than n0: 100"),
        (("certify.sigma=0.1", "certify.radii=[]"), r"certify.radii"),
    ],
)
def test_impossible_settings_are_one_clear_error(
    run: Path, settings: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certify", str(run), *settings]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.strip().splitlines()) == 1
    assert not (run / "certify").exists()
