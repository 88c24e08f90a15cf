"""Semi-supervised training and fine-tuning on two real processes: equal, and resumed exactly."""

from functools import partial
from pathlib import Path

import datasets
import pytest
from launching import SMALL, Forked, killed_and_resumed, quickstart_run

from robust_accel.commands.certify import certify_model
from robust_accel.commands.pseudo_label import pseudo_label
from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

# All that keeps a state or an order of its own: half of each batch pseudo-labelled, mixed, TRADES
# on online targets, AWP, a moving average, fine-tuning layer by layer from another run's weights.
REGIME = (
    "model.checkpoint={run}",
    "model.new_head=true",
    "optimizer.layer_decay=0.8",
    "data.train_size=400",
    "data.unlabeled.path={labels}",
    "data.mix={{cutmix: 1.0, mixup: 0.2}}",
    "data.policy=trivial",
    "objective.name=trades",
    "objective.online_targets=true",
    "train.gradient_accumulation=2",
    "train.awp.gamma=0.01",
    "train.awp.warmup_epochs=1",
    "train.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quickstart_run(tmp_path_factory.mktemp("runs") / "two", Forked)


@pytest.fixture(scope="module")
def labels(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Labels of the first run's model for what its training left out, by two processes."""
    path = tmp_path_factory.mktemp("labels") / "pseudo.parquet"
    code, output = Forked("pseudo-label", finished, "--out", path).wait()
    assert code == 0, output
    assert "653 images" in output
    return path


@pytest.mark.long
def test_a_regime_resumes_exactly_on_two_processes(
    finished: Path, labels: Path, tmp_path: Path
) -> None:
    settings = [s.format(labels=labels, run=finished) for s in REGIME]
    whole = tmp_path / "whole"
    start = partial(Forked, "train", "quickstart", *SMALL, *settings)
    code, output = start(f"output={whole}").wait()
    assert code == 0, output
    report = RunFolder(whole).read_report()
    assert report["bytes_sent_per_step"] > 0
    killed_and_resumed(whole, tmp_path / "killed", start)


def test_labels_do_not_depend_on_the_number_of_processes(
    finished: Path, labels: Path, tmp_path: Path
) -> None:
    pseudo_label(str(finished), tmp_path / "one.parquet")
    one, two = (
        datasets.load_dataset("parquet", data_files=str(path), cache_dir=str(tmp_path))["train"]
        for path in (tmp_path / "one.parquet", labels)
    )
    for column in ("pseudo_label", "confidence"):
        assert one[column][:] == two[column][:]


def test_certificates_do_not_depend_on_the_number_of_processes(
    finished: Path, tmp_path: Path
) -> None:
    settings = ["certify.sigma=0.1", "certify.n=300", "certify.images=6"]
    code, output = Forked("certify", finished, *settings, f"output={tmp_path / 'two'}").wait()
    assert code == 0, output
    assert len(list((tmp_path / "two" / "measurements").glob("process-*.jsonl"))) == 2
    certify_model(str(finished), [*settings, f"output={tmp_path / 'one'}"])
    one, two = (
        [line.rsplit("\t", 1)[0] for line in log.read_text().splitlines()]  # but for the time
        for log in (tmp_path / name / "certify" / "certify.tsv" for name in ("one", "two"))
    )
    assert one == two
    assert len(one) == 7
