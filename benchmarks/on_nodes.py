"""What does a whole training cost on a slow network? A launcher of nodes that are namespaces here.

Each of N nodes is one process with one thread, behind one switch, and every link is held to a rate.
All share this machine's cores. Needs Linux, root, `ip` and `tc`; no packet leaves the namespaces,
which are removed at the end.

python benchmarks/on_nodes.py --nodes 4 --rate 1gbit -m robust_accel train quickstart
robust-accel study paper/table4_network --jobs 1 \\
    --launcher "python benchmarks/on_nodes.py --nodes {processes} --rate 1gbit"
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from _network import INTERFACE, SUBNET, inside, network

PORT = 29541
GRACE = 60  # seconds until those that wait for a failed one are killed


def run(nodes: int, rate: str, command: Sequence[str]) -> int:
    """Start the command on each node; the code of the first that ends otherwise than by 0."""
    common = {
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "LOCAL_RANK": "0",
        "MASTER_ADDR": f"{SUBNET}.1",
        "MASTER_PORT": str(PORT),
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(nodes),
    }
    with network(nodes, rate) as names:
        processes = [
            subprocess.Popen(
                inside(name, f"node-{rank}", sys.executable, *command),
                env=os.environ | common | {"RANK": str(rank)},
            )
            for rank, name in enumerate(names)
        ]

        def hand_on(number: int, _: object) -> None:
            for process in processes:
                process.send_signal(number)

        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, hand_on)
        failed = 0.0
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):  # the others wait for it
                failed = failed or time.monotonic()
                late = time.monotonic() > failed + GRACE
                hand_on(signal.SIGKILL if late else signal.SIGTERM, None)
            time.sleep(0.2)
        code = next((p.returncode for p in processes if p.returncode), 0)
        return code if code >= 0 else 128 - code  # as shells have it, for a signal


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rate", default="1gbit", help="of each link, as tc has it, or none")
    parser.add_argument("-m", dest="module", required=True, nargs=argparse.REMAINDER)
    options = parser.parse_args()
    sys.exit(run(options.nodes, options.rate, ["-m", *options.module]))


if __name__ == "__main__":
    main()
