"""A run of two real processes by the real launcher, and what others do with it: the same as one."""

from functools import partial
from pathlib import Path

import datasets
import pytest
from launching import SMALL, ZERO2, Forked, Launched, killed_and_resumed, quickstart_run, weights

from robust_accel.commands.certify import certify_model
from robust_accel.commands.evaluate import evaluate_model
from robust_accel.commands.pseudo_label import pseudo_label
from robust_accel.evaluation.ledger import read_records
from robust_accel.recipe_file import RECIPES
from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

ZERO = [("--config_file", str(RECIPES / f"accelerate/zero{stage}.yaml")) for stage in (0, 1, 2)]

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
    return quickstart_run(tmp_path_factory.mktemp("runs") / "two")


def test_two_processes_train_with_equal_parameters_and_count_their_bytes(finished: Path) -> None:
    report = RunFolder(finished).read_report()
    assert report["num_processes"] == 2
    clean = report["measurements"][0]
    assert (clean["images"]["n"], clean["num_processes"]) == (360, 2)
    assert clean["accuracy"] > 0.5
    # 2-sided, 2 workers: 2 (M - 1) / M b d / 8 bytes, scales and small tensors on top
    num_parameters = sum(
        tensor.numel() for key, tensor in weights(finished).items() if "running" not in key
    )
    assert num_parameters < report["bytes_sent_per_step"] < 1.2 * num_parameters
    assert 0 < report["comm_exposed_seconds_per_epoch"] <= report["comm_seconds_per_epoch"]
    first = report["applied"]
    assert first["processes_with_equal_parameters"] == 2
    assert first["bytes_sent"] == pytest.approx(report["bytes_sent_per_step"])
    assert first["attack"]["moved"] == first["attack"]["images"] > 0


@pytest.mark.long  # tests of comm/ and Forked runs train by DeepSpeed, too
@pytest.mark.parametrize("flags", ZERO, ids=["zero0", "zero1", "zero2"])
def test_deepspeed_trains_by_the_same_recipe(
    finished: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folder = RunFolder(tmp_path / "run")
    run = ("train", "quickstart", *SMALL, "communication.compile=auto")  # the default
    code, output = Launched(*run, f"output={folder.path}", flags=flags).wait()
    assert code == 0, output
    report, by_ddp = folder.read_report(), RunFolder(finished).read_report()
    assert report["num_processes"] == 2
    # the same gradient in other buckets; only their padding differs
    assert report["bytes_sent_per_step"] == pytest.approx(by_ddp["bytes_sent_per_step"], rel=0.02)
    first, expected = folder.read_metrics()[0], RunFolder(finished).read_metrics()[0]
    assert first["loss"] == pytest.approx(expected["loss"], rel=0.02)
    if flags == ZERO[2]:
        start = partial(Forked, *run, environment=ZERO2)
        killed_and_resumed(folder.path, tmp_path / "killed", start)


def test_evaluation_does_not_depend_on_the_number_of_processes(
    finished: Path, tmp_path: Path
) -> None:
    one = read_records(evaluate_model(str(finished), [f"output={tmp_path / 'one'}"]).folder.path)
    two = read_records(finished)
    assert len(one) == len(two) == 4
    for alone, together in zip(one, two, strict=True):
        assert alone["num_processes"] < together["num_processes"]
        for key in ("key", "outcomes", "forward_passes"):
            assert alone[key] == together[key]


def test_a_wrong_recipe_stops_before_anything_is_made(tmp_path: Path) -> None:
    wrong = ("communication.bits=7", "communication.name=qsgd")
    code, output = Forked("train", "quickstart", *wrong, f"output={tmp_path / 'run'}").wait()
    assert code != 0
    message = "command line: communication.bits: 7 is not allowed: input should be 16, 8, 4 or 2"
    assert output.count(message) == 1  # once, not once a process
    assert not (tmp_path / "run").exists()


# ---- regimes: semi-supervised, fine-tuned, certified ---------------------------------------------


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
