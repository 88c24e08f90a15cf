"""What a run has sent does not depend on how often it was started."""

from pathlib import Path

from accelerate import Accelerator

from robust_accel.comm import Meter
from robust_accel.run_folder import RunFolder
from robust_accel.training.checkpoint import Progress
from robust_accel.training.metrics import Metrics

FIRST, LATER = 1352, 1000  # bytes of a step: DDP makes its buckets anew after a process's first


def test_a_restart_sends_what_a_step_sends(tmp_path: Path) -> None:
    def trained(progress: Progress, num_steps: int) -> None:
        """A process: starts, trains, saves where it stands."""
        meter = Meter()
        about = {"steps_per_epoch": 100, "trackers": False}
        metrics = Metrics(RunFolder(tmp_path), Accelerator(cpu=True), progress, meter, **about)
        with metrics.bar(100):
            metrics.start_clock()
            for step in range(num_steps):
                meter.sent(LATER if step else FIRST)
                progress.step += 1
                metrics.advance()
            metrics.stop_clock()

    whole, interrupted = Progress(), Progress()
    trained(whole, 9)
    for num_steps in (3, 1, 1, 4):
        trained(interrupted, num_steps)
    assert interrupted.bytes_sent == whole.bytes_sent == FIRST + 8 * LATER
