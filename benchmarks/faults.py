"""What do faults cost? Runs are killed, hung, cut off, starved and corrupted at random moments.

Each must then end as the same run that was left alone: with its weights bit for bit, its metrics,
its counts and its verdicts; all that differs is lost. The processes are forked from one that has
imported everything, as in the tests; `launcher killed` and the network's faults start real ones
(Linux, root, `iproute2`, `nftables`; a full disk wants root, too: `--only` names other rows).
Seconds: from the restart to the first checkpoint, or the end, that is new.

    .venv/bin/python benchmarks/faults.py [--only killed nan] [--times 12] [--seed 0]
"""

import argparse
import itertools
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import _network
import psutil
from _lab import ENGINES, RUN, Lab, Row, alive_after, newly, until
from launching import Launched
from safetensors.torch import load_file
from test_networks import NAMES, STATIC, Inside, Machines

from robust_accel.exit_codes import NOT_FINITE, STOPPED, UNAVAILABLE, UNWRITABLE, USAGE
from robust_accel.run_folder import RunFolder

SOON = "train.timeout=8s"  # for who must be missed: to start takes longer on a busy machine
# Where a kill is aimed at: what is then in the folder. Elsewhere it comes at a random moment.
MOMENTS = {
    "in a checkpoint": "checkpoints/incomplete-step-*",
    "at a manifest": "checkpoints/incomplete-step-*/*manifest*",
    "in best.safetensors": "checkpoints/.incomplete-*best*",
    "in the model": "**/.incomplete-*model*",
    "in the report": ".incomplete-*report*",
    "in evaluation": "measurements/process-*.jsonl",
}


# ---- the faults ---------------------------------------------------------------------------------


def killed(lab: Lab, times: int) -> Row:
    """All processes at once, by SIGKILL; and again after each restart."""
    row, folder = Row(f"killed, {lab.engine}"), lab.folder()
    aims = itertools.cycle([*MOMENTS, None, None])
    while row.times < times:
        aim = next(aims)
        process, new = lab.start(folder, "--resume"), lab.progress(folder, row)
        if aim is None:
            hit = alive_after(lab.draws.uniform(0, lab.seconds), process, new)
        else:
            hit = until(newly(folder, MOMENTS[aim]), process)
            time.sleep(lab.draws.uniform(0, 0.01))
        if hit and process.running():
            process.kill()
            row.times += 1
            row.about[aim or "anywhere"] += 1
            continue
        new(ended=True)
        code, output = process.wait()
        fault = f"code {code}: {output.strip().splitlines()[-1:]}" if code else lab.loss(folder)
        row.lost += [fault] if fault else []
        folder = lab.folder()
    lab.resumed(folder, row)
    return row


def stopped(lab: Lab, times: int) -> Row:
    """By SIGTERM, SIGUSR1 or SIGINT to one of them, while they train or evaluate."""
    row = Row(f"signal to one, {lab.engine}")
    while row.times < times:
        folder = lab.folder()
        process = lab.start(folder)
        if alive_after(lab.draws.uniform(1, lab.seconds), process):
            number = lab.draws.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
            os.kill(lab.draws.choice(process.processes).pid, number)
            code, output = process.wait()
            row.times += 1
            row.about[f"{number.name}"] += 1
            if code not in (STOPPED, 130) or "--resume goes on" not in output:
                row.lost.append(f"code {code}: {output.strip().splitlines()[-1:]}")
            lab.resumed(folder, row)
        else:
            process.wait()
    return row


def rank_gone(lab: Lab, times: int, number: signal.Signals) -> Row:
    """One process hangs (SIGSTOP) or is lost (SIGKILL); the other one must say so and end."""
    row = Row(f"one process {'hangs' if number == signal.SIGSTOP else 'is lost'}, {lab.engine}")
    while row.times < times:
        folder = lab.folder()
        process = lab.start(folder, SOON)
        if not alive_after(lab.draws.uniform(1, lab.seconds - 0.5), process):
            process.wait()
            continue
        victim, other = lab.draws.sample(process.processes, 2)
        os.kill(victim.pid, number)
        began = time.monotonic()
        other.join(30)
        named = "rank" in process.log.read_text()
        row.times += 1
        row.about[f"named in {5 * -(-(time.monotonic() - began) // 5):.0f} s or less"] += named
        if other.exitcode != UNAVAILABLE or not named:
            row.lost.append(f"code {other.exitcode}: {process.log.read_text().splitlines()[-1:]}")
        process.kill()
        lab.resumed(folder, row)
    return row


def launcher_killed(lab: Lab, times: int) -> Row:
    """The launcher alone, by SIGKILL: its processes must end by themselves."""
    row = Row("launcher killed, DDP")
    for _ in range(times):
        folder = lab.folder()
        process = Launched(*RUN, f"output={folder.path}")
        while process.running() and not folder.steps():
            time.sleep(0.02)
        ranks = psutil.Process(process.process.pid).children(recursive=True)
        process.process.kill()
        began = time.monotonic()
        left = psutil.wait_procs(ranks, timeout=20)[1]
        row.times += 1
        row.about[f"ended in {5 * -(-(time.monotonic() - began) // 5):.0f} s or less"] += not left
        row.lost += [f"{len(left)} processes go on"] if left else []
        for rank in left:
            rank.kill()
        lab.resumed(folder, row)
    return row


def two_machines(lab: Lab, folder: RunFolder, nodes: list[str]) -> list[Inside]:
    """A process on each of two nodes, of one run."""
    common = {"MASTER_ADDR": f"{_network.SUBNET}.1", "MASTER_PORT": "29513"}
    return [
        Inside(
            node, "robust_accel", *RUN, f"output={folder.path}", SOON,
            log=lab.root / f"node{rank}.log", RANK=str(rank), LOCAL_RANK="0",
            WORLD_SIZE="2", **common,
        )
        for rank, node in enumerate(nodes)
    ]  # fmt: skip


def link_cut(lab: Lab, times: int) -> Row:
    """Two machines (namespaces), and the link between them goes down."""
    row = Row("link cut, DDP on two nodes")
    for _ in range(times):
        folder = lab.folder()
        with _network.network(2, "none") as nodes:
            ranks = two_machines(lab, folder, nodes)
            while ranks[0].running() and not folder.steps():
                time.sleep(0.02)
            subprocess.run(["ip", "-n", nodes[1], "link", "set", "eth0", "down"], check=True)
            ends = [rank.process.wait(60) for rank in ranks]
        row.times += 1
        row.about["both sides name the other"] += ends == [UNAVAILABLE] * 2
        row.lost += [] if ends == [UNAVAILABLE] * 2 else [f"codes {ends}"]
        lab.resumed(folder, row)
    return row


def packets_lost(lab: Lab, times: int) -> Row:
    """Two machines, and of what each is sent some packets never come: all must, in the end."""
    row = Row("packets lost, DDP on two nodes")
    for percent in itertools.islice(itertools.cycle((1, 5, 10)), times):
        folder = lab.folder()
        with _network.network(2, "none") as nodes:
            for node in nodes:
                _network.lose(node, percent)
            ranks = two_machines(lab, folder, nodes)
            ends = [rank.process.wait(600) for rank in ranks]
        row.times += 1
        named = UNAVAILABLE in ends  # the network was too bad for too long: somebody says so
        row.about[f"{percent}%: {'named, and gone on from' if named else 'to its end'}"] += 1
        if named:
            lab.resumed(folder, row)
        else:
            fault = f"codes {ends}" if any(ends) else lab.loss(folder)
            row.lost += [fault] if fault else []
    return row


def node_lost(lab: Lab, times: int) -> Row:
    """One of two machines, without a common disk; another one takes its place."""
    row = Row("node lost and replaced, DDP on two nodes")
    for _ in range(times):
        root = lab.folder().path
        with (
            _network.network(len(NAMES), "none") as nodes,
            _network.named(nodes, NAMES),
        ):
            machines = Machines(nodes, root, STATIC, RUN, {})
            machines.start(0, 0)
            machines.start(1, 1)
            while machines.all[0].running() and not machines.done():
                time.sleep(0.02)
            time.sleep(lab.draws.uniform(0, 0.5))
            machines.lose(1)
            began, before = time.monotonic(), machines.done()
            machines.start(2, 1)
            while machines.all[0].running() and machines.done() == before:
                time.sleep(0.02)
            row.seconds.append(time.monotonic() - began)
            ends = [launcher.wait()[0] for launcher in machines.all.values()]
            machines.kill()
        row.times += 1
        row.about["by the launcher itself"] += ends == [0, 0]
        fault = f"codes {ends}" if any(ends) else lab.loss(machines.result())
        row.lost += [fault] if fault else []
    return row


def two_owners(lab: Lab, times: int) -> Row:
    """Two runs start in one folder at once."""
    row = Row(f"two owners, {lab.engine}")
    for _ in range(times):
        folder = lab.folder()
        both = [lab.start(folder), lab.start(folder, "--resume")]
        ends = [process.wait() for process in both]
        row.times += 1
        codes = sorted(code for code, _ in ends)
        row.about["one refused" if codes == [0, USAGE] else "one after the other"] += 1
        fault = lab.loss(folder) if codes in ([0, USAGE], [0, 0]) else f"codes {codes}"
        row.lost += [fault] if fault else []
    return row


def flipped(lab: Lab, _: int) -> Row:
    """One bit of each file of the newest checkpoint, and of best.safetensors."""
    row, cut = Row(f"bit flipped, {lab.engine}"), lab.folder()
    process = lab.start(cut)
    assert until(lambda: len(cut.steps()) > 1 and cut.best.exists(), process, limit=600)
    process.kill()
    names = [p.relative_to(cut.path) for p in cut.steps()[-1].rglob("*") if p.is_file()]
    for name in [*names, cut.best.relative_to(cut.path)]:
        folder = lab.folder()
        shutil.copytree(cut.path, folder.path)
        content = bytearray((folder.path / name).read_bytes())
        content[lab.draws.randrange(len(content))] ^= 1 << lab.draws.randrange(8)
        (folder.path / name).write_bytes(content)
        row.times += 1
        lab.resumed(folder, row)
    row.about["files"] = row.times
    return row


def nan(lab: Lab, _: int) -> Row:
    """NaN or Inf in one process, at the first, a middle and the last step."""
    row = Row(f"NaN or Inf, {lab.engine}")
    rank = ENGINES[lab.engine][0] - 1
    for where, step in itertools.product(
        ("loss", "value", "gradient", "weight", "buffer"), (1, 9, 16)
    ):
        folder = lab.folder()
        faulty = ("objective.name=faulty:Faulty", f"objective.at=[{step}]")
        faulty += (f"objective.where={where}", f"objective.rank={rank}")
        code, output = lab.start(
            folder, *faulty, f"objective.number={['nan', 'inf'][step % 2]}"
        ).wait()
        row.times += 1
        said = "finite" in output
        row.about["ended in a sentence"] += bool(
            code == NOT_FINITE and said and "Traceback" not in output
        )
        if code != NOT_FINITE or not said:
            row.lost.append(f"{where} at {step}: code {code}")
        for path in folder.checkpoints.rglob("*.safetensors"):
            if not all(tensor.isfinite().all() for tensor in load_file(path).values()):
                row.lost.append(f"{where} at {step}: {path.name} is not finite")
    return row


def disk_full(lab: Lab, times: int) -> Row:
    """No space is left in the middle; then there is, and the run goes on."""
    row = Row(f"disk full, {lab.engine}")
    disk = lab.root / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    size = sum(p.stat().st_size for p in lab.whole.steps()[-1].rglob("*") if p.is_file())
    for _ in range(times):
        subprocess.run([*mount, "size=256m", "tmpfs", str(disk)], check=True)
        folder = RunFolder(disk / "run")
        process = lab.start(folder)
        until(folder.steps, process)
        free = int(lab.draws.uniform(0.1, 1.5) * size)
        (disk / "other").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - free)))
        code, output = process.wait()
        row.times += 1
        row.about["said in a sentence"] += code == UNWRITABLE and "Traceback" not in output
        row.about["had room"] += code == 0
        if code not in (UNWRITABLE, 0):
            row.lost.append(f"code {code}: {output.strip().splitlines()[-1:]}")
        (disk / "other").unlink()
        lab.resumed(folder, row)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return row


def rows(
    only: list[str], engines: list[str], times: int, root: Path, draws: random.Random
) -> Iterator[Row]:
    one, ddp = ("one process", "DDP")
    plan: list[tuple[str, str, Callable[[Lab], Row]]] = [
        *(("killed", engine, lambda lab: killed(lab, times)) for engine in ENGINES),
        *(("signal", engine, lambda lab: stopped(lab, max(1, times // 4))) for engine in ENGINES),
        ("hung", ddp, lambda lab: rank_gone(lab, max(1, times // 4), signal.SIGSTOP)),
        ("lost", ddp, lambda lab: rank_gone(lab, max(1, times // 4), signal.SIGKILL)),
        ("launcher", ddp, lambda lab: launcher_killed(lab, max(1, times // 6))),
        ("cut", ddp, lambda lab: link_cut(lab, max(1, times // 6))),
        ("packets", ddp, lambda lab: packets_lost(lab, max(1, times // 4))),
        ("node", ddp, lambda lab: node_lost(lab, max(1, times // 6))),
        ("owners", one, lambda lab: two_owners(lab, max(1, times // 2))),
        *(
            ("flipped", engine, lambda lab: flipped(lab, times))
            for engine in (one, ddp, "ZeRO 2", "FSDP2")
        ),
        *(("nan", engine, lambda lab: nan(lab, times)) for engine in (one, ddp, "FSDP2")),
        ("disk", one, lambda lab: disk_full(lab, max(1, times // 4))),
    ]
    labs: dict[str, Lab] = {}
    for name, engine, fault in plan:
        if (not only or name in only) and (not engines or engine in engines):
            if engine not in labs:
                labs[engine] = Lab(root, engine, draws)
            yield fault(labs[engine])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="killed, signal, hung, lost, ...")
    parser.add_argument(
        "--engines", nargs="+", default=[], metavar="ENGINE", help=", ".join(ENGINES)
    )
    parser.add_argument("--times", type=int, default=12, help="kills an engine; others less")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("| fault | times | lost | seconds to recover: median (most) | |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as root:
        draws = random.Random(options.seed)
        for row in rows(options.only, options.engines, options.times, Path(root), draws):
            print(row, flush=True)


if __name__ == "__main__":
    main()
