"""Two real processes under the real launcher."""

from functools import partial
from pathlib import Path

import pytest
from launching import SMALL, ZERO2, Forked, Launched, killed_and_resumed, quickstart_run, weights

from robust_accel.evaluation.ledger import read_records
from robust_accel.recipe_file import RECIPES
from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

ZERO = [("--config_file", str(RECIPES / f"accelerate/zero{stage}.yaml")) for stage in (0, 1, 2)]


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
    from robust_accel.commands.evaluate import evaluate_model

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
