"""A run's pictures take longer than a small run: they are drawn where a test looks at them.

Forked processes draw none; those of the real launcher draw all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from robust_accel.reporting import report
from robust_accel.reporting.charts import Chart
from robust_accel.reporting.figures import draw


def only_named(chart: Chart, folder: Path) -> Path:
    return folder / f"{chart.name}.png"


@contextmanager
def drawn() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", draw)
        yield


report.draw = only_named
