"""A process that hangs or is gone is named by the others, and ends the run in time."""

import signal
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
from launching import CPU, Forked, wait_until

from robust_accel.exit_codes import UNAVAILABLE
from robust_accel.run_folder import RunFolder

pytestmark = pytest.mark.launch

start = partial(
    Forked,
    "train",
    "quickstart",
    "data.train_size=256",
    "train.epochs=500",
    "train.batch_size=16",
    "train.log_every=1",
    "train.timeout=10s",
    "data.validation_size=0",
    "attack.num_steps=1",
    "attack.step_size=0.2",
)


@pytest.mark.parametrize(
    ("number", "rank"),
    [
        (signal.SIGSTOP, 1),
        (signal.SIGKILL, 0),
        pytest.param(signal.SIGSTOP, 0, marks=pytest.mark.long),
        pytest.param(signal.SIGKILL, 1, marks=pytest.mark.long),
    ],
)
def test_one_that_hangs_or_dies_is_named(tmp_path: Path, number: signal.Signals, rank: int) -> None:
    folder = RunFolder(tmp_path / "run")
    process = start(f"output={folder.path}")
    victim, other = process.processes[rank], process.processes[1 - rank]
    wait_until(lambda: len(folder.read_metrics()) > 2, process)
    began = time.monotonic()
    process.send(number, rank)
    other.join(60)
    seconds = time.monotonic() - began
    victim.kill()
    assert other.exitcode == UNAVAILABLE
    assert seconds < 16
    output = process.wait()[1]
    (line,) = [line for line in output.splitlines() if line.startswith("robust-accel: ")]
    assert f"robust-accel: rank {1 - rank} on " in line and "at step " in line
    said = line.partition(" has been at ")[2]
    if rank == 0:  # which keeps what all of them tell
        assert "rank 0 at 127.0.0.1:" in said
    else:
        assert f"(process {victim.pid}) does not answer, last heard of at step " in said
    assert "Traceback" not in output


@pytest.mark.long
def test_one_whose_work_hangs_is_named_though_it_answers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import time
        from datetime import timedelta
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs
        from robust_accel.training.peers import watched
        from robust_accel.training.stopping import Stop

        limit = InitProcessGroupKwargs(timeout=timedelta(seconds=9))
        accelerator = Accelerator(kwargs_handlers=[limit])
        with watched(6, Stop()) as heartbeat:
            for step in (1, 2):
                accelerator.wait_for_everyone()
                heartbeat.at("training", step)
            if not accelerator.is_main_process:
                time.sleep(40)
            heartbeat.at("training", 3)
            accelerator.wait_for_everyone()
        """)
    )
    process = Forked(script=script, environment=CPU)
    waiting, hanging = process.processes
    waiting.join(35)
    hanging.kill()
    assert waiting.exitcode == 1
    output = process.wait()[1]
    named = f"(process {hanging.pid}) is at step 2 (training)"
    told, raised = (line for line in output.splitlines() if named in line)
    assert told.startswith("robust-accel: rank 0 on ") and "at step 3 (training)" in told
    assert "Unavailable: " in raised


@pytest.mark.long
def test_one_with_more_work_is_waited_for_and_one_that_fails_is_not(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import time
        from accelerate import Accelerator
        from robust_accel.comm.heartbeat import Heartbeat
        from robust_accel.evaluation.ledger import told_to_all
        from robust_accel.training.peers import watched
        from robust_accel.training.stopping import Stop

        accelerator = Accelerator()
        with watched(5, Stop()) as heartbeat:
            if accelerator.is_main_process:
                time.sleep(9)
            print("told", told_to_all([accelerator.process_index], accelerator), flush=True)
            if not accelerator.is_main_process:
                raise KeyError("a fault of this process")
            told_to_all([1], accelerator)
        """)
    )
    code, output = Forked(script=script, environment=CPU).wait()
    assert code == 1
    assert output.count("told [0, 1]") == 2
    assert "Unavailable: " in output
    assert "has ended at step 0 (start): KeyError: 'a fault of this process'" in output
