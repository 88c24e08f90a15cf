"""Runs on machines that are namespaces of this one: links that are cut, and ranks lost."""

import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from launching import CPU, DDP, Launched, wait_until, weights

from robust_accel.exit_codes import UNAVAILABLE
from robust_accel.recipe_file import RECIPES
from robust_accel.run_folder import RunFolder

pytestmark = [pytest.mark.launch, pytest.mark.long]

RUN = (
    "train",
    "quickstart",
    "data.train_size=384",
    "data.validation_size=0",
    "train.epochs=40",
    "train.batch_size=32",
    "train.log_every=1",
    "train.checkpoint_every=5",
    "train.timeout=10s",
    "attack.num_steps=1",
    "attack.step_size=0.2",
    "evaluate.autoattack=null",
    "evaluate.pgd=null",
)


NAMES = ("node-1", "node-2", "node-0")  # the last one takes a lost one's place
C10D = ("torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1")
C10D += ("--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29517", "--max-restarts", "3")
STATIC = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "2")
STATIC += ("--num_processes", "2", "--main_process_ip", "10.77.0.1")
STATIC += ("--main_process_port", "29517", "--max_restarts", "3", "--machine_rank")
HSDP = ("accelerate.commands.launch", "--config_file", RECIPES / "accelerate" / "hsdp.yaml")
HSDP += ("--main_process_ip", NAMES[0], "--machine_rank")
EACH_ITS_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def _network() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "_network.py"
    spec = importlib.util.spec_from_file_location("_network", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Three namespaces behind a switch; the first has the address 10.77.0.1."""
    network = _network()
    with ExitStack() as stack:
        try:
            made = stack.enter_context(network.network(len(NAMES), "none"))
        except (SystemExit, RuntimeError) as error:
            if "ROBUST_ACCEL_TEST_NETWORKS" in os.environ:  # make test-networks: asked for by name
                raise
            pytest.skip(str(error))
        stack.enter_context(network.named(made, NAMES))
        yield made


class Inside:
    """A module's process in a namespace.

    Args:
        name: Of the host.
        disk: Where it is at work.
    """

    def __init__(
        self,
        node: str,
        *command: object,
        log: Path,
        name: str = NAMES[0],
        disk: Path | None = None,
        **environment: str,
    ) -> None:
        self.log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(
                _network().inside(node, name, sys.executable, "-m", *map(str, command)),
                cwd=disk,
                env=os.environ | CPU | {"GLOO_SOCKET_IFNAME": "eth0"} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """And all that it has started, at once, as when a machine is lost."""
        if self.running():
            root = psutil.Process(self.process.pid)
            for victim in [root, *root.children(recursive=True)]:
                victim.kill()
        self.process.wait()

    def wait(self) -> tuple[int, str]:
        return self.process.wait(240), self.log.read_text()


@pytest.mark.parametrize("fault", ["link down", "all packets lost"])
def test_a_cut_link_ends_both_sides_in_time_and_each_names_the_other(
    tmp_path: Path, nodes: list[str], fault: str
) -> None:
    folder = RunFolder(tmp_path / "run")
    common = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "WORLD_SIZE": "2"}
    ranks = []
    for rank, node in enumerate(nodes[:2]):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", **common}
        command = ("robust_accel", *RUN, f"output={folder.path}")
        ranks.append(Inside(node, *command, log=tmp_path / str(rank), **own))
    try:
        wait_until(folder.steps, ranks[0])
        cut = ["ip", "-n", nodes[1], "link", "set", "eth0", "down"]
        if fault == "all packets lost":
            switch = f"{nodes[1].rpartition('-')[0]}-switch"
            cut = ["ip", "-n", switch, "link", "set", "port1", "nomaster"]
        subprocess.run(cut, check=True)
        began = time.monotonic()
        ends = [rank.wait() for rank in ranks]
        assert time.monotonic() - began < 20
    finally:
        for rank in ranks:
            rank.kill()
    for (code, output), other in zip(ends, ("rank 1 on ", "rank 0 at 10.77.0.1:"), strict=True):
        assert code == UNAVAILABLE, output
        (line,) = [line for line in output.splitlines() if line.startswith("robust-accel: ")]
        assert other in line.partition(" has been at ")[2], line
        assert "does not answer" in line
    assert folder.steps()


def _sent(node: str) -> int:
    """Bytes that have left a node."""
    counter = ("cat", "/sys/class/net/eth0/statistics/tx_bytes")
    found = subprocess.run(["ip", "netns", "exec", node, *counter], capture_output=True, check=True)
    return int(found.stdout)


def test_copies_of_pieces_on_two_machines_send_gradients_alone(
    tmp_path: Path, nodes: list[str]
) -> None:
    width, steps = 192, 4
    options = f"{{img_size: 8, patch_size: 4, depth: 4, embed_dim: {width}}}"
    model = f"model={{name: vit_tiny_patch16_224, options: {options}}}"
    run = ("train", "quickstart", model, f"train.max_steps={steps}", "train.validation_steps=1")
    run += ("evaluate.autoattack=null", "evaluate.pgd=null", "evaluate.train_images=null")
    numbers = 4 * 12 * width**2  # of the blocks, nearly all
    bits = {32: "communication={name: allreduce}", 8: "communication={name: qsgd, bits: 8}"}
    for number, communication in bits.items():
        folder, before = RunFolder(tmp_path / f"run{number}"), [_sent(node) for node in nodes[:2]]
        machines = []
        for rank, node in enumerate(nodes[:2]):
            command = (*HSDP, str(rank), "-m", "robust_accel", *run, communication)
            log = tmp_path / f"{number}-{rank}"
            output = f"output={folder.path}"
            machines.append(Inside(node, *command, output, log=log, name=NAMES[rank]))
        try:
            ends = [machine.wait() for machine in machines]
        finally:
            for machine in machines:
                machine.kill()
        for code, output in ends:
            assert code == 0, output
        assert all(tensor.isfinite().all() for tensor in weights(folder.path).values())
        for node, at_first in zip(nodes, before, strict=False):
            expected = steps * numbers * number / 8  # an all-reduce of two: each sends it once
            assert expected < _sent(node) - at_first < 1.4 * expected


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    code, output = Launched(*RUN, f"output={folder}").wait()
    assert code == 0, output
    return folder


def test_a_killed_rank_is_started_again_and_the_run_goes_on(tmp_path: Path, finished: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    process = Launched(*RUN, f"output={folder.path}", flags=(*DDP, "--max_restarts", "2"))
    wait_until(folder.steps, process)
    ranks = psutil.Process(process.process.pid).children()
    (victim,) = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
    victim.kill()
    code, output = process.wait()
    assert code == 0, output
    assert "continuing" in output
    before, after = weights(finished), weights(folder.path)
    assert all(before[key].equal(after[key]) for key in before | after)


class Machines:
    """Two nodes, each with a launcher, one process and a disk of its own; and one in reserve.

    Args:
        launcher: `C10D` or `STATIC`.
        command: Of the run, with `output=run`.
        root: Of the disks.
    """

    def __init__(
        self,
        nodes: list[str],
        root: Path,
        launcher: tuple[str, ...],
        command: tuple[str, ...],
        environment: Mapping[str, str],
    ) -> None:
        self.nodes, self.launcher, self.environment = nodes, launcher, environment
        self.command = ("-m", "robust_accel", *command, "output=run")
        self.disks = [root / f"disk{i}" for i in range(len(nodes))]
        self.folders = [RunFolder(disk / "run") for disk in self.disks]
        self.all: dict[int, Inside] = {}

    def start(self, number: int, machine_rank: int, *more: str) -> None:
        """The ordinary command on a node, with some arguments more."""
        disk = self.disks[number]
        disk.mkdir(parents=True, exist_ok=True)
        own = (str(machine_rank),) if self.launcher is STATIC else ()
        self.all[number] = Inside(
            self.nodes[number],
            *(*self.launcher, *own, *self.command, *more),
            log=disk / "log",
            name=NAMES[number],
            disk=disk,
            **self.environment,
        )

    def lose(self, number: int) -> None:
        """A node, without a word: its link first, so that its end is not heard of."""
        down = ["ip", "-n", self.nodes[number], "link", "set", "eth0", "down"]
        subprocess.run(down, check=True)
        self.all.pop(number).kill()

    def kill(self) -> None:
        for launcher in self.all.values():
            launcher.kill()

    def done(self) -> set[str]:
        """Checkpoints, on whichever disk, and reports."""
        found = {path.name for folder in self.folders for path in folder.steps()}
        return found | {str(folder.report) for folder in self.folders if folder.report.exists()}

    def result(self) -> RunFolder:
        """The folder of the process that was first in the end."""
        return next(folder for folder in self.folders if folder.report.exists())


@pytest.mark.parametrize(
    ("launcher", "environment", "becomes_first"),
    [(STATIC, {}, False), (C10D, EACH_ITS_STORE, True)],
)
def test_a_lost_machine_is_replaced_and_the_run_goes_on_to_the_same_end(
    tmp_path: Path,
    finished: Path,
    nodes: list[str],
    launcher: tuple[str, ...],
    environment: dict[str, str],
    becomes_first: bool,
) -> None:
    machines = Machines(nodes, tmp_path, launcher, RUN, environment)
    try:
        machines.start(0, 0)
        machines.start(1, 1)
        wait_until(machines.done, machines.all[0])
        machines.lose(1)
        machines.start(2, 1)
        ends = {number: launcher.wait() for number, launcher in machines.all.items()}
    finally:
        machines.kill()
    for code, output in ends.values():
        assert code == 0, output
    result = machines.result()
    assert result is machines.folders[2 if becomes_first else 0]
    output = ends[2 if becomes_first else 0][1]
    assert "continuing run at step" in output
    assert ("run is taken over" in output) == becomes_first
    before, after = weights(finished), weights(result.path)
    assert all(before[key].equal(after[key]) for key in before | after)


@pytest.mark.parametrize("launcher", [STATIC, C10D])
def test_machines_that_do_not_meet_at_first_meet_later_and_the_slower_one_is_waited_for(
    tmp_path: Path, finished: Path, nodes: list[str], launcher: tuple[str, ...]
) -> None:
    machines = Machines(nodes, tmp_path, launcher, RUN, {})

    def link(state: str) -> None:
        subprocess.run(["ip", "-n", nodes[1], "link", "set", "eth0", state], check=True)

    try:
        link("down")
        machines.start(1, 1)  # there is no way to the other, which has not come either
        time.sleep(8)
        machines.start(0, 0)
        time.sleep(8)
        assert not machines.done()
        link("up")
        wait_until(machines.done, machines.all[0])
        slow = psutil.Process(machines.all[1].process.pid)
        stops = 0
        while machines.all[1].running() and stops < 20:
            with suppress(psutil.NoSuchProcess):  # at the end
                for process in (running := slow.children(recursive=True)):
                    process.suspend()
                time.sleep(0.3)
                for process in running:
                    process.resume()
            time.sleep(0.1)
            stops += 1
        ends = [machines.all[number].wait() for number in (0, 1)]
    finally:
        machines.kill()
    for code, output in ends:
        assert code == 0, output
    assert stops > 3
    before, after = weights(finished), weights(machines.result().path)
    assert all(before[key].equal(after[key]) for key in before | after)


@pytest.mark.parametrize("environment", [{}, EACH_ITS_STORE])
def test_of_two_machines_one_process_is_killed_and_both_go_on(
    tmp_path: Path, finished: Path, nodes: list[str], environment: dict[str, str]
) -> None:
    """The other launcher does not count the restart, and its process is the first."""
    machines = Machines(nodes, tmp_path, C10D, RUN, environment)
    try:
        machines.start(0, 0)
        machines.start(1, 1)
        wait_until(machines.done, machines.all[0])
        processes = psutil.Process(machines.all[1].process.pid).children(recursive=True)
        (victim,) = [process for process in processes if process.environ().get("RANK") == "1"]
        victim.kill()
        ends = [launcher.wait() for launcher in machines.all.values()]
    finally:
        machines.kill()
    for code, output in ends:
        assert code == 0, output
    before, after = weights(finished), weights(machines.result().path)
    assert all(before[key].equal(after[key]) for key in before | after)
