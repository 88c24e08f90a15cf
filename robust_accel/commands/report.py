"""The report command: reports written anew, and runs side by side."""

import argparse

from robust_accel.reporting.report import comparison_table, write_report
from robust_accel.run_folder import RunFolder


def run(options: argparse.Namespace) -> int:
    for folder in options.runs:
        write_report(RunFolder(folder))
    print(comparison_table(options.runs))
    return 0
