"""What does a protocol gain on a slow network? Seconds and bytes on real, rate-limited links.

N nodes are N network namespaces on a bridge in one more namespace; each link is held to a rate by
tbf at both ends. Each node is one process with one thread, gloo over TCP. Needs root, `ip` and
`tc`. No packet leaves the namespaces, and they are removed at the end, whatever happens.

exchange  The backward of a DistributedDataParallel model whose gradients are ready at once (fixed
          random tensors of the model's shapes, DDP's own buckets): communication and nothing else.
          --engine fsdp2: of an FSDP2 model in parts of about two million elements, whose weights
          are gathered before; fp32 is FSDP2's own reduce-scatter, which on gloo is an all-reduce.
step      A training step of RobustModel (one-step attack, backward overlapped with communication).
          Exposed is what the step takes more than the same step in `no_sync`, CPU time included.

Seconds are medians over --repeats after a warm-up, each from a barrier on. All nodes share this
machine's cores, so a protocol that computes pays here for all N of them; on a cluster it does not.

python benchmarks/comm.py                                     # 4 nodes, 1 Gbit/s and 100 Mbit/s
python benchmarks/comm.py --nodes 2 3 4 --rate 1gbit --what exchange
python benchmarks/comm.py --engine fsdp2 --rate 1gbit
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from statistics import median
from typing import Any

import timm
import torch
import torch.distributed as dist
from _gradients import FixedGradients, Parts
from _network import INTERFACE, SUBNET, enter, network, payload_sent, tool
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from robust_accel import FGSMRS, QSGD, AllReduce, RobustModel, compress_gradients
from robust_accel.comm import GradientCompression

BASELINE = "fp32"
POWERSGD = "powersgd"
COLLECTIVES: dict[str, AllReduce | QSGD | None] = {
    BASELINE: None,  # plain DDP: gloo's all-reduce, no hook
    "fp16": AllReduce(dtype="fp16"),
    POWERSGD: None,  # torch's own hook
    "8bit-1sided": QSGD(bits=8, sides=1),
    "8bit-2sided": QSGD(bits=8, sides=2),
    "4bit-1sided": QSGD(bits=4, sides=1),
    "4bit-2sided": QSGD(bits=4, sides=2),
}
PROTOCOLS = {
    "ddp": [name for name in COLLECTIVES if name != "4bit-1sided"],
    "fsdp2": [BASELINE, "fp16", "8bit-1sided", "4bit-1sided"],  # there is no second side
}
# (engine, rate, nodes): least speed-up of the exchange over fp32
GOALS = {
    ("ddp", "1gbit", 4): {"8bit-2sided": 2.5, "4bit-2sided": 3.0},
    ("ddp", "100mbit", 4): {"8bit-2sided": 3.5, "4bit-2sided": 6.0},
    ("fsdp2", "1gbit", 4): {"8bit-1sided": 2.0, "4bit-1sided": 2.5},
}
PORT = 29500
BATCH, IMAGE, EPS = 8, 32, 8 / 255


@dataclass(frozen=True)
class Case:
    """One row of a table: a protocol on a network."""

    engine: str
    protocol: str
    nodes: int
    rate: str
    model: str
    what: tuple[str, ...]
    repeats: int
    timeout: float


# ---- one node --------------------------------------------------------------------------------


def node(case: Case, rank: int, namespace: str, results: Connection) -> None:
    """A node's whole life, in a forked process: join, measure, tell."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(os.devnull, "w") as silence:  # gloo and the warnings of N processes
        os.dup2(silence.fileno(), 1)
        os.dup2(silence.fileno(), 2)
    try:
        enter(namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://{SUBNET}.1:{PORT}",
            rank=rank,
            world_size=case.nodes,
            timeout=timedelta(seconds=case.timeout),
        )
        for what in case.what:
            results.send({"exchange": measure_exchange, "step": measure_step}[what](case))
        results.send("done")
        dist.barrier()
    except BaseException as error:
        results.send(f"fails: {' '.join(str(error).split()) or type(error).__name__}")
    # no interpreter shutdown: the parent's copies of everything, and gloo's threads, hang in it
    os._exit(0)


def distribute(
    model: nn.Module, case: Case
) -> tuple[DistributedDataParallel, GradientCompression | None]:
    """Put a model in DDP with the case's protocol; returns both, or None for torch's own."""
    # PowerSGD runs collectives in callbacks, which gloo survives with one bucket at the best
    bucket_cap_mb = 4096 if case.protocol == POWERSGD else None
    # the same seed made the same weights; to send them takes long on a slow link
    ddp = DistributedDataParallel(model, bucket_cap_mb=bucket_cap_mb, init_sync=False)
    if case.protocol == POWERSGD:
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=1, start_powerSGD_iter=2
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    collective = COLLECTIVES[case.protocol]
    if collective is None:
        return ddp, None
    return ddp, compress_gradients(ddp, collective)


def shard(model: Parts, case: Case) -> tuple[nn.Module, GradientCompression | None]:
    """The same by FSDP2; None for its own reduce-scatter."""
    mesh = init_device_mesh("cpu", (case.nodes,))
    for part in model:
        fully_shard(part, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    collective = COLLECTIVES[case.protocol]
    return model, None if collective is None else compress_gradients(model, collective)


def measure_exchange(case: Case) -> dict[str, float]:
    """Seconds of one whole gradient's exchange, and the bytes that this node sent for it."""
    torch.manual_seed(dist.get_rank())
    inner = timm.create_model(case.model, num_classes=10)
    num_parameters = sum(p.numel() for p in inner.parameters())
    model: nn.Module
    if case.engine == "fsdp2":
        model, compression = shard(Parts(inner), case)
    else:
        model, compression = distribute(FixedGradients(inner.parameters()), case)
    meter = compression and compression.meter
    loss = torch.zeros(())

    def forward() -> None:
        nonlocal loss
        model.zero_grad()
        loss = model()

    def exchange() -> None:
        loss.backward()

    warm_up(lambda: (forward(), exchange()), case)
    start_formula, payload = meter.bytes_sent if meter else 0, 0.0
    seconds = []
    for _ in range(case.repeats):
        forward()  # FSDP2 gathers its weights
        start_payload = payload_sent()
        seconds.append(timed(exchange, 1))
        payload += (payload_sent() - start_payload) / case.repeats
    # gloo's reduce-scatter is an all-reduce, too
    ring = 2 * (case.nodes - 1) * 4 * num_parameters / case.nodes
    if meter:
        formula = (meter.bytes_sent - start_formula) / case.repeats
    else:
        formula = ring if case.protocol == BASELINE else float("nan")
    return {"exchange": median(seconds), "formula": formula, "payload": payload}


def measure_step(case: Case) -> dict[str, float]:
    """Seconds of a whole training step, and how many of them are not there without sending."""
    torch.manual_seed(0)
    inner = timm.create_model(case.model, num_classes=10)
    model, compression = distribute(RobustModel(inner, FGSMRS(eps=EPS)), case)
    meter = compression and compression.meter
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(dist.get_rank())
    x, labels = torch.rand(BATCH, 3, IMAGE, IMAGE), torch.randint(10, (BATCH,))

    def step() -> None:
        model(x, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    def local_step() -> None:
        with model.no_sync():
            step()

    warm_up(step, case)
    before = meter.exposed_seconds if meter else 0.0
    seconds = timed(step, case.repeats)
    result = {"step": seconds}
    if meter:
        result["exposed_by_meter"] = (meter.exposed_seconds - before) / case.repeats
    if compression:
        compression.close()  # it refuses steps on gradients that were not sent
    result["exposed"] = seconds - timed(local_step, case.repeats)
    return result


def warm_up(work: Callable[[], Any], case: Case) -> None:
    """DDP makes its buckets anew after the first iteration, and PowerSGD starts at the third."""
    for _ in range(4 if case.protocol == POWERSGD else 2):
        work()


def timed(work: Callable[[], None], repeats: int) -> float:
    """Median seconds of `work`, each time from a common start."""
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


# ---- all of them -----------------------------------------------------------------------------


def run(case: Case) -> dict[str, Any]:
    """Run a case in processes of its own; a hang or a crash costs this row only.

    Returns:
        The nodes' results, averaged, and `trouble` where it did not come to its end.
    """
    context = multiprocessing.get_context("fork")  # the imports take longer than the measurement
    with network(case.nodes, case.rate) as namespaces:
        ends, processes = [], []
        try:
            for rank, namespace in enumerate(namespaces):
                end, other = context.Pipe(duplex=False)
                process = context.Process(target=node, args=(case, rank, namespace, other))
                process.start()
                other.close()
                ends.append(end)
                processes.append(process)
            return collect(ends, case.timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()


def collect(ends: Sequence[Connection], timeout: float) -> dict[str, Any]:
    """Read what the nodes send until all are done, one fails, or time is up."""
    deadline = time.monotonic() + timeout
    numbers: dict[str, list[float]] = {}
    waiting, trouble = list(ends), ""
    while waiting and not trouble:
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            trouble = f"not done in {timeout:.0f} s"
        for end in ready:
            assert isinstance(end, Connection)
            try:
                message = end.recv()
            except EOFError:
                message = "fails: a process died"
            if isinstance(message, dict):
                for key, value in message.items():
                    numbers.setdefault(key, []).append(value)
            elif message == "done":
                waiting.remove(end)
            else:
                trouble = trouble or message[:100]
    complete = {k: sum(v) / len(v) for k, v in numbers.items() if len(v) == len(ends)}
    return complete | ({"trouble": trouble} if trouble else {})


COLUMNS: dict[str, tuple[str, ...]] = {
    "exchange": ("exchange (s)", "speed-up", "sent (MB)", "on the wire (MB)", "wire / sent"),
    "step": ("step (s)", "speed-up", "exposed (s)", "exposed by meter (s)"),
}


def cells(what: str, row: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """A row's numbers as text; what is missing is empty."""

    def show(value: float | None, form: str) -> str:
        return "" if value is None or value != value else format(value, form)

    seconds, base = row.get(what), baseline.get(what)
    gain = base / seconds if base and seconds else None
    if what == "step":
        exposed = (row.get("exposed"), row.get("exposed_by_meter"))
        return [show(seconds, ".3f"), show(gain, ".2f"), *(show(e, ".3f") for e in exposed)]
    sent, wire = row.get("formula"), row.get("payload")
    ratio = wire / sent if wire and sent else None
    megabytes = [show(n and n / 1e6, ".2f") for n in (sent, wire)]
    return [show(seconds, ".3f"), show(gain, ".2f"), *megabytes, show(ratio, ".3f")]


def print_row(values: Sequence[str]) -> None:
    print("| " + " | ".join(values) + " |", flush=True)


def run_table(case: Case, protocols: Sequence[str]) -> None:
    """One table: every protocol on one network, each line as soon as it is known."""
    print(f"\n{case.engine}, {case.nodes} nodes, {case.rate}, {case.model}, {case.repeats} repeats")
    header = ["protocol", *(column for what in case.what for column in COLUMNS[what])]
    print_row(header)
    print_row(["---"] * len(header))
    rows: dict[str, dict[str, Any]] = {}
    for protocol in protocols:
        row = rows[protocol] = run(replace(case, protocol=protocol))
        values = [c for what in case.what for c in cells(what, row, rows.get(BASELINE, {}))]
        name = f"{protocol}: {row['trouble']}" if "trouble" in row else protocol
        print_row([name, *values])
    for protocol, goal in GOALS.get((case.engine, case.rate, case.nodes), {}).items():
        times = [rows.get(name, {}).get("exchange") for name in (BASELINE, protocol)]
        if all(times):
            gain = times[0] / times[1]
            verdict = "met" if gain >= goal else "not met"
            print(f"goal: {protocol} exchanges {goal}x faster than fp32: {gain:.2f}x, {verdict}")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, nargs="+", default=[4])
    parser.add_argument(
        "--rate", nargs="+", default=["1gbit", "100mbit"], help="as tc writes it, or none"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--engine", choices=PROTOCOLS, default="ddp")
    parser.add_argument("--protocols", nargs="+", choices=COLLECTIVES, help="all of the engine's")
    parser.add_argument("--model", default="resnet18", help="a timm model")
    parser.add_argument("--what", help="exchange, step, or both; fsdp2: exchange")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one row")
    args = parser.parse_args(arguments)
    known = ["exchange", "step"] if args.engine == "ddp" else ["exchange"]
    args.what = tuple((args.what or ",".join(known)).split(","))
    args.protocols = args.protocols or PROTOCOLS[args.engine]
    if not set(args.what) <= set(known):
        parser.error(f"--what: {','.join(args.what)} is not of {', '.join(known)}")
    if not set(args.protocols) <= set(PROTOCOLS[args.engine]):
        parser.error(f"--protocols: {args.engine} has {', '.join(PROTOCOLS[args.engine])}")
    if min(args.nodes) < 2 or args.repeats < 1:
        parser.error("--nodes must be >= 2 and --repeats >= 1")
    return args


def main() -> int:
    args = parse()
    tool("ip"), tool("tc")
    # a killed benchmark leaves no namespaces either: `finally` runs on SystemExit
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print(f"torch {torch.__version__}; {os.cpu_count()} cores for all nodes")
    print("sent: bytes of a node in an exchange, by formula")
    print("on the wire: the same by its interface's counter, less TCP/IP headers")
    for rate in args.rate:
        for nodes in args.nodes:
            case = Case(
                engine=args.engine, protocol=BASELINE, nodes=nodes, rate=rate, model=args.model,
                what=args.what, repeats=args.repeats, timeout=args.timeout,
            )  # fmt: skip
            run_table(case, args.protocols)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
