"""The report command: reports written anew, runs side by side, exports."""

import argparse

from robust_accel.commands import say
from robust_accel.files import write_text
from robust_accel.reporting.exports import check_export, csv, latex
from robust_accel.reporting.page import page
from robust_accel.reporting.report import write_report
from robust_accel.reporting.tables import comparison
from robust_accel.reporting.views import read_runs
from robust_accel.run_folder import RunFolder
from robust_accel.training.disk import check_writable


def run(options: argparse.Namespace) -> int:
    exports = {
        "--csv": (options.csv, ".csv", csv),
        "--latex": (options.latex, ".tex", lambda runs: latex(comparison(runs))),
        "--html": (options.html, ".html", page),
    }
    named = {name: found for name, found in exports.items() if found[0] is not None}
    for name, (path, suffix, _) in named.items():
        check_export(name, path, suffix)
        check_writable(path.parent, name)
    runs = read_runs(options.runs, everything=options.all)  # all of them, before one is written
    for folder in options.runs:
        write_report(RunFolder(folder), everything=options.all)
    for path, _, text in named.values():
        write_text(path, text(runs))
        say(f"{path}")
    table = comparison(runs)
    print(table.markdown())
    return 0
