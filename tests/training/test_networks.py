"""Runs on machines that are namespaces of this one: links that are cut, and ranks lost."""

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import psutil
import pytest
from launching import CPU, DDP, Launched, wait_until, weights

from robust_accel.exit_codes import UNAVAILABLE
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


def _network() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "_network.py"
    spec = importlib.util.spec_from_file_location("_network", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two namespaces with a link between them; the first has the address 10.77.0.1."""
    network = _network()
    try:
        made = network.network(2, "none")
        names = made.__enter__()
    except (SystemExit, RuntimeError) as error:
        pytest.skip(str(error))
    # bound over /etc/hosts by `ip netns exec`: torch asks for names, and there is nobody to answer
    known = "127.0.0.1 localhost\n10.77.0.1 node-0\n10.77.0.2 node-1\n"
    folders = [Path("/etc/netns") / name for name in names]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "hosts").write_text(known)
    yield names
    for folder in folders:
        shutil.rmtree(folder)
    made.__exit__(None, None, None)


class Inside:
    """A process in a namespace."""

    def __init__(self, node: str, *command: object, log: Path, **environment: str) -> None:
        self.log = log
        with log.open("a") as file:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", node, sys.executable, "-m", *map(str, command)],
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
    for rank, node in enumerate(nodes):
        own = {"RANK": str(rank), "LOCAL_RANK": "0", **common}
        command = ("robust_accel", *RUN, f"output={folder.path}", "--quiet")
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
        assert other in line.partition(" has waited ")[2], line
        assert "does not answer" in line
    assert folder.steps()


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
