"""What a run tells while it trains: averages, clocks, the meter's counts, lines, bar, trackers."""

import logging
import math
import resource
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from torch import Tensor
from tqdm.auto import tqdm

from robust_accel.comm import Meter
from robust_accel.console import shows_bars
from robust_accel.data import NO_LABEL
from robust_accel.files import append_line
from robust_accel.objectives import predicted
from robust_accel.run_folder import RunFolder
from robust_accel.training.checkpoint import Progress

logger = logging.getLogger(__name__)


class Metrics:
    """Lines of ``metrics.jsonl``, the bar and the trackers; and the report's clocks.

    Args:
        progress: Gets the seconds and bytes.
        trackers: Whether Accelerate has any.
        gathered: Bytes of weights, where they are in pieces.
    """

    def __init__(
        self,
        folder: RunFolder,
        accelerator: Accelerator,
        progress: Progress,
        meter: Meter,
        *,
        steps_per_epoch: int,
        trackers: bool,
        gathered: Meter | None = None,
    ) -> None:
        self._folder, self._accelerator, self._progress = folder, accelerator, progress
        self._meter, self._steps_per_epoch = meter, steps_per_epoch
        self._trackers, self._gathered = trackers, gathered
        self._bar: tqdm = tqdm(disable=True)
        self._sent = 0  # bytes, before the step under way
        self._continues = False  # whether it is the first one after a restart

    def bar(self, total_steps: int) -> tqdm:
        """The progress bar of the steps that are left, to be closed by the caller."""
        self._continues = self._progress.step > 1
        self._bar = tqdm(
            total=total_steps,
            initial=self._progress.step,
            desc=self._folder.path.name,
            unit="step",
            disable=not shows_bars(),
        )
        return self._bar

    def show_step(self) -> None:
        """Where the run stands, which may be further back than it was."""
        if self._bar.n != self._progress.step:
            self._bar.n = self._progress.step
            self._bar.refresh()

    def advance(self) -> None:
        """One optimizer step is done."""
        self._bar.update()
        sent = self._meter.bytes_sent - self._sent
        self._sent += sent
        if self._continues and self._progress.bytes_of_step:
            # in a process's first step DDP's buckets are others than later on: not the run's cost
            self._at_start["bytes_sent"] += sent - self._progress.bytes_of_step
        else:
            self._progress.bytes_of_step = sent
        self._continues = False

    def log(
        self, averages: "Averages", clean: Tensor, images: int, about: dict[str, float]
    ) -> None:
        """Write a line on the steps since the last one.

        Args:
            averages: Without losses and accuracies where all steps were left out.
            clean: From ``count_right`` on clean images, of this process.
            images: That all processes have trained on since the last line.
            about: More that is the same on all processes: the rate.
        """
        own = averages.sums | {"clean_batch_accuracy": clean}
        sums = {name: reduce(pair, "sum").tolist() for name, pair in own.items()}
        line = {name: total / number for name, (total, number) in sums.items() if number}
        line["labeled_images"] = int(sums.get("robust_batch_accuracy", (0, 0))[1])
        cost = {name: n for name, n in self._communication().items() if not math.isnan(n)}
        line |= {"images_per_second": images / averages.seconds(), **cost}
        line |= about | {"skipped_steps": self._progress.skipped_steps}
        shown = {"loss": f"{line.get('loss', math.nan):.3f}"}
        for kind in ("clean", "robust"):
            shown[kind] = f"{100 * line.get(f'{kind}_batch_accuracy', math.nan):.1f}%"
        shown |= {
            "images_s": f"{line['images_per_second']:.0f}",
            "sent": f"{line['bytes_sent'] / 2**20:.1f}MiB",
        }
        if "comm_exposed_seconds" in line:
            shown["waited"] = f"{line['comm_exposed_seconds']:.0f}s"
        self._bar.set_postfix(shown)
        self.write(line)

    def write(self, line: dict[str, float]) -> None:
        """One line to ``metrics.jsonl`` and to the trackers.

        Numbers that are not finite are null there, and listed under ``nonfinite``; trackers, some
        of which take none, don't get them.
        """
        step = self._progress.step
        nonfinite = [name for name, value in line.items() if not math.isfinite(value)]
        if self._accelerator.is_main_process:
            where = {"step": step, "epoch": step / self._steps_per_epoch}
            told = {"nonfinite": nonfinite} if nonfinite else {}
            append_line(self._folder.metrics, where | line | told)
            if self._bar.disable:  # else it shows them
                logger.info("step %d %s", step, " ".join(f"{k}={v:.5g}" for k, v in line.items()))
        if self._trackers:
            finite = {name: value for name, value in line.items() if name not in nonfinite}
            self._accelerator.log(finite, step=step)

    def start_clock(self) -> None:
        self._started = time.perf_counter()
        self._at_start = self._counts()

    def stop_clock(self) -> None:
        """Add what has passed to the run's progress."""
        self._progress.train_seconds += time.perf_counter() - self._started
        for name, value in self._communication().items():
            setattr(self._progress, name, value)

    def _counts(self) -> dict[str, float]:
        counts: dict[str, float] = {
            "bytes_sent": self._meter.bytes_sent,
            "comm_seconds": self._meter.seconds,
            "comm_exposed_seconds": self._meter.exposed_seconds,
        }
        if self._gathered is not None:
            counts["bytes_of_weights_sent"] = self._gathered.bytes_sent
        return counts

    def _communication(self) -> dict[str, float]:
        """What training has cost this rank, earlier parts of a continued run included."""
        return {
            name: getattr(self._progress, name) + value - self._at_start[name]
            for name, value in self._counts().items()
        }


class Averages:
    """Sums of the steps' numbers since the last line, kept on the device.

    Attributes:
        sums: Of each number its sum, and of how many: [2].
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}
        self._step: list[dict[str, Tensor]] = []  # micro-batches of the step under way
        self._start(0.0)

    def _start(self, seconds: float) -> None:
        self._started = time.perf_counter() - seconds

    def add(self, out: dict[str, Tensor], labels: Tensor) -> None:
        """Note a micro-batch, whose step is not taken yet."""
        right = count_right(predicted(out["logits"].detach()), labels)
        scalars = {k: v.detach().float() for k, v in out.items() if v.ndim == 0}
        pairs = {k: torch.stack([v, torch.ones_like(v)]) for k, v in scalars.items()}
        self._step.append(pairs | {"robust_batch_accuracy": right})

    def settle(self, taken: bool) -> None:
        """Count the micro-batches of a step, or leave them out."""
        for found in self._step if taken else []:
            if self.count == 0:
                self.sums = {}
            for name, value in found.items():
                known = name in self.sums
                self.sums[name] = self.sums[name].to(value) + value if known else value
            self.count += 1
        self._step = []

    def seconds(self) -> float:
        return time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        sums = {name: total.cpu() for name, total in self.sums.items()}
        return {"count": self.count, "sums": sums, "seconds": self.seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.sums = state["count"], dict(state["sums"])
        self._start(state["seconds"])


def count_right(predictions: Tensor, labels: Tensor) -> Tensor:
    """Of the images that have a label, how many are right, and how many there are: [2].

    Where labels are mixed, [B, K], the largest counts.
    """
    labels = labels.argmax(dim=1) if labels.ndim > 1 else labels
    labeled = labels != NO_LABEL
    return torch.stack([((predictions == labels) & labeled).sum(), labeled.sum()]).float()


def peak_memory(device: torch.device) -> int:
    """Bytes that this process has held at most: of the GPU, or of all memory without one.

    Memory is what the kernel counts as resident. Arrays in files are read, not mapped, and no part
    of it; what ``datasets`` maps, to decode images, is.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
