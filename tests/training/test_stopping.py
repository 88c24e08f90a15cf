"""Asked to stop, a run ends at once with a checkpoint, and goes on as if nothing had been."""

import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from launching import CPU, DDP, Forked, Launched, port, wait_until, weights

from robust_accel.__main__ import main
from robust_accel.exit_codes import INTERRUPTED, STOPPED, USAGE
from robust_accel.recipe import load_recipe
from robust_accel.run_folder import RunFolder
from robust_accel.training.run import train
from robust_accel.training.stopping import REQUESTS, Stopped

pytestmark = pytest.mark.launch

RUN = (
    "train",
    "quickstart",
    "data.train_size=400",
    "train.epochs=2",
    "train.batch_size=16",
    "train.log_every=1",
    "train.validation_steps=60",  # a second or more
    "train.select=best",
    "attack.num_steps=1",
    "attack.step_size=0.2",
    "evaluate.autoattack=null",
    "evaluate.batch_size=72",
    "evaluate.train_images=null",
    "evaluate.pgd.num_steps=5",
)
start = partial(Forked, *RUN)


def lines(path: Path) -> list[tuple]:
    """What a run has told, but for its clocks."""
    keys = ("step", "loss", "validation_robust_accuracy")
    return [tuple(line.get(key) for key in keys) for line in RunFolder(path).read_metrics()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, output = start(f"output={folder}").wait()
    assert code == 0, output
    return folder


def goes_on_to_the_same_end(path: Path, finished: Path) -> None:
    code, output = start(f"output={path}", "--resume").wait()
    assert code == 0, output
    before, after = weights(finished), weights(path)
    assert all(before[key].equal(after[key]) for key in before | after)
    assert lines(path) == lines(finished)
    reports = [RunFolder(folder).read_report() for folder in (path, finished)]
    assert reports[0]["selection"] == reports[1]["selection"]


def test_one_process_stops_and_goes_on(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    recipe = load_recipe("quickstart", [*RUN[2:], f"output={folder.path}"])
    before = [signal.getsignal(number) for number in REQUESTS]

    def ask() -> None:
        while not folder.read_metrics():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(Stopped) as stopped:
        train(recipe)
    assert stopped.value.code == STOPPED
    (checkpoint,) = folder.steps()
    assert int(checkpoint.name.removeprefix("step-")) == folder.read_metrics()[-1]["step"]
    assert [signal.getsignal(number) for number in REQUESTS] == before
    assert train(recipe, resume=True)["steps"] == 32


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, STOPPED), pytest.param(signal.SIGINT, INTERRUPTED, marks=pytest.mark.long)],
)
def test_a_signal_to_one_process_stops_all_at_one_step(
    tmp_path: Path, finished: Path, number: signal.Signals, code: int
) -> None:
    folder = RunFolder(tmp_path / "run")
    process = start(f"output={folder.path}")
    wait_until(lambda: len(folder.read_metrics()) > 2, process)
    process.send(number, 1)
    step = len(folder.read_metrics())
    found, output = process.wait()
    assert found == code, output
    assert output.count("stopped (") == 1 and "Traceback" not in output
    (checkpoint,) = folder.steps()
    assert str(checkpoint) in output
    assert step <= int(checkpoint.name.removeprefix("step-")) <= step + 4
    goes_on_to_the_same_end(folder.path, finished)


# the last arguments: at which call of which method one of the processes gets a signal
AT = """
import os, signal, sys
from robust_accel.__main__ import main
from robust_accel.training.loop import Loop
from robust_accel.training.stopping import Stop
*arguments, name, call = sys.argv[1:]
owner = {"after_step": Stop, "save": Loop}[name]
real, calls = getattr(owner, name), []
def met(self):
    calls.append(name)
    if len(calls) == int(call) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return real(self)
setattr(owner, name, met)
sys.exit(main(arguments))
"""


@pytest.mark.parametrize(
    ("name", "call", "step"),
    [
        ("after_step", 16, 16),
        pytest.param("after_step", 32, 32, marks=pytest.mark.long),  # the run's last, too
        pytest.param("save", 1, 16, marks=pytest.mark.long),
    ],
)
def test_a_signal_at_an_epochs_last_step_stops_both(
    tmp_path: Path, finished: Path, name: str, call: int, step: int
) -> None:
    """Where no step follows in which the others would hear of it, and while the epoch is kept."""
    folder, script = RunFolder(tmp_path / "run"), tmp_path / "at.py"
    script.write_text(AT)
    process = start(f"output={folder.path}", name, call, script=script)
    _, output = process.wait()
    assert [each.exitcode for each in process.processes] == [STOPPED, STOPPED], output
    assert output.count("stopped (") == 1 and "Traceback" not in output
    assert "robust-accel: " not in output  # nor is any other sentence said
    assert folder.steps()[-1].name == f"step-{step:08}"
    goes_on_to_the_same_end(folder.path, finished)


@pytest.mark.long
def test_a_validation_is_stopped_in_the_middle_and_done_again(
    tmp_path: Path, finished: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    process = start(f"output={folder.path}")
    wait_until(folder.steps, process)
    time.sleep(0.3)
    began = time.monotonic()
    process.send(signal.SIGUSR1)
    code, output = process.wait()
    assert code == STOPPED, output
    assert time.monotonic() - began < 10
    assert "epoch 1: held-out" not in output
    goes_on_to_the_same_end(folder.path, finished)


@pytest.mark.long
def test_a_run_stops_by_itself_before_its_time_is_up(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    process = start(f"output={folder.path}", "train.epochs=500", "train.max_time=15s")
    created = psutil.Process(process.processes[0].pid).create_time()
    code, output = process.wait()
    assert code == STOPPED, output
    assert 10 < time.time() - created < 16
    assert "stopped (train.max_time is nearly up)" in output
    (last,) = folder.steps()[-1:]
    assert int(last.name.removeprefix("step-")) == folder.read_metrics()[-1]["step"]


def test_a_second_signal_disturbs_nothing(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    process = start(f"output={folder.path}")
    wait_until(folder.read_metrics, process)
    for _ in range(20):
        process.send(signal.SIGTERM)
        time.sleep(0.02)
        if not process.running():
            break
    code, output = process.wait()
    assert code == STOPPED, output
    assert folder.steps()


def _launcher(environment: dict[str, str], arguments: list[str]) -> None:
    """Starts a rank of its own, and waits."""
    os.environ |= environment
    if os.fork():
        signal.pause()
    from robust_accel.__main__ import main

    os._exit(main(arguments))


def test_a_process_ends_without_its_launcher_even_where_it_waits_for_another(
    tmp_path: Path,
) -> None:
    environment = {**CPU, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port()}
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}  # the other never comes
    arguments = [*RUN, f"output={tmp_path / 'run'}"]
    context = multiprocessing.get_context("forkserver")
    launcher = context.Process(target=_launcher, args=(environment, arguments))
    launcher.start()
    started = psutil.Process(launcher.pid)
    while not started.children():
        time.sleep(0.01)
    (rank,) = started.children()
    while len(rank.net_connections()) < 1:  # it has come to where it waits
        time.sleep(0.05)
    launcher.kill()
    assert psutil.wait_procs([rank], timeout=10)[1] == []


@pytest.mark.long
def test_a_killed_launcher_takes_all_processes_with_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    process = Launched(*RUN, f"output={folder.path}", "train.epochs=50")
    ranks = []
    wait_until(folder.read_metrics, process)
    ranks = psutil.Process(process.process.pid).children(recursive=True)
    assert len(ranks) >= 2
    process.process.kill()
    assert psutil.wait_procs(ranks, timeout=10)[1] == []
    assert folder.steps()  # there was time for a checkpoint


@pytest.mark.long
def test_a_launcher_that_is_asked_to_end_leaves_a_checkpoint(
    tmp_path: Path, finished: Path
) -> None:
    folder = RunFolder(tmp_path / "run")
    process = Launched(*RUN, f"output={folder.path}")
    wait_until(lambda: len(folder.read_metrics()) > 2, process)
    process.process.send_signal(signal.SIGTERM)
    code, output = process.wait()
    assert code != 0
    assert "stopped (got SIGTERM)" in output
    goes_on_to_the_same_end(folder.path, finished)


@pytest.mark.long
def test_what_was_stopped_is_not_started_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    process = Launched(*RUN, f"output={folder.path}", flags=(*DDP, "--max_restarts", "2"))
    wait_until(folder.read_metrics, process)
    for rank in psutil.Process(process.process.pid).children():
        if rank.environ().get("RANK") == "1":
            rank.send_signal(signal.SIGUSR1)
    code, output = process.wait()
    assert code != 0
    assert output.count("stopped (got SIGUSR1)") == 1
    assert "continuing" not in output


@pytest.mark.long
def test_an_evaluation_ends_at_once_and_goes_on(tmp_path: Path, finished: Path) -> None:
    evaluate = ("evaluate", finished, "evaluate.pgd.num_steps=201", "evaluate.batch_size=24")
    process = Forked(*evaluate)
    kept = finished / "measurements"
    before = sum(len(path.read_text().splitlines()) for path in kept.glob("process-*"))

    def units() -> int:
        return sum(len(path.read_text().splitlines()) for path in kept.glob("process-*")) - before

    wait_until(lambda: units() > 16, process)  # clean ones are 15
    process.send(signal.SIGTERM)
    began = time.monotonic()
    code, output = process.wait()
    assert code == STOPPED, output
    assert time.monotonic() - began < 10
    assert "Traceback" not in output
    assert output.count("robust-accel: stopped (got SIGTERM): the same command goes on") == 1
    done = units()
    code, output = Forked(*evaluate).wait()
    assert code == 0, output
    assert 17 <= done < units() == 30  # none was done twice


def test_what_is_refused_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor gone on from, as what torchrun restarts is."""
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda process, number: told.append((process, number)))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "no/such/recipe"]) == USAGE
    assert told == [(os.getppid(), signal.SIGTERM)]
