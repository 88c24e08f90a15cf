"""The network of comm.py: a namespace a node, one switch, links held to a rate; and its counter."""

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

SHAPING = ("burst", "512kb", "latency", "100ms")
HEADERS = 66  # Ethernet 14, IPv4 20, TCP with timestamps 32
SUBNET, INTERFACE = "10.77.0", "eth0"
CLONE_NEWNET = 0x40000000


def tool(name: str) -> str:
    path = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if path is None or os.geteuid() != 0:
        needed = "root, and `ip` and `tc` (package iproute2); faults.py also `nft` (nftables)"
        raise SystemExit(f"a network of namespaces needs {needed}")
    return path


def ip(*arguments: str, check: bool = True) -> None:
    run = subprocess.run([tool("ip"), *arguments], capture_output=True, text=True)
    if check and run.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {run.stderr.strip()}")


@contextmanager
def network(nodes: int, rate: str) -> Iterator[list[str]]:
    """Namespaces of `nodes` nodes behind one switch, every link at `rate` both ways.

    Args:
        rate: as tc writes it (`1gbit`), or `none`.

    Yields:
        The nodes' namespaces. Node i is {SUBNET}.{i + 1}.
    """
    # with the pid: two benchmarks at once do not meet. Links die with their namespaces
    switch, *names = [f"robust-{os.getpid()}-{i}" for i in ("switch", *range(nodes))]
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for i, name in enumerate(names):
            port, peer = f"port{i}", ("peer", "name", INTERFACE, "netns", name)
            ip("netns", "add", name)
            ip("-n", switch, "link", "add", port, "type", "veth", *peer)
            ip("-n", switch, "link", "set", port, "master", "br0", "up")
            ip("-n", name, "addr", "add", f"{SUBNET}.{i + 1}/24", "dev", INTERFACE)
            ip("-n", name, "link", "set", INTERFACE, "up")
            ip("-n", name, "link", "set", "lo", "up")
            if rate != "none":
                limit(switch, port, rate)
                limit(name, INTERFACE, rate)
        yield names
    finally:
        for name in (*names, switch):
            ip("netns", "del", name, check=False)


@contextmanager
def named(nodes: Sequence[str], names: Sequence[str]) -> Iterator[None]:
    """Let nodes find one another by host names, in what `inside` starts."""
    hosts = [f"{SUBNET}.{i + 1} {name}\n" for i, name in enumerate(names)]
    folders = [Path("/etc/netns") / node for node in nodes]
    try:
        for folder in folders:  # `ip netns exec` binds what is in it over /etc
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("".join(["127.0.0.1 localhost\n", *hosts]))
        yield
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


def inside(namespace: str, name: str, *command: str) -> list[str]:
    """What starts a command on a node, whose host name it is given."""
    shell = f'hostname {name}; exec "$@"'
    names = ["unshare", "--uts", "sh", "-c", shell, "sh"]
    return [tool("ip"), "netns", "exec", namespace, *names, *command]


def limit(namespace: str, device: str, rate: str) -> None:
    """Hold what `device` sends to `rate`."""
    command = [tool("tc"), "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf"]
    run = subprocess.run([*command, "rate", rate, *SHAPING], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"tc: {run.stderr.strip()} (rate {rate!r})")


def lose(namespace: str, percent: int) -> None:
    """Drop so many of the packets that a node is sent, at random."""
    rules = "add table ip lossy; add chain ip lossy in { type filter hook input priority 0; }; "
    rules += f"add rule ip lossy in iifname {INTERFACE} numgen random mod 100 < {percent} drop"
    command = [tool("ip"), "netns", "exec", namespace, tool("nft"), rules]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"nft: {run.stderr.strip()}")


def enter(namespace: str) -> None:
    """Move this process to a network namespace (os.setns is Python 3.12's)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}") as file:
        if libc.setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def payload_sent() -> int:
    """Bytes that this node's interface has sent, by the kernel's counter, less headers.

    The counter takes a segment that the card would split (GSO) as one packet with one header, so
    `HEADERS` a packet is exact but for TCP options; repeats and gloo's own headers stay in.
    """
    dist.barrier()
    time.sleep(0.2)  # what was sent last may still wait in this node's queue
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    fields = next(line for line in lines if line.strip().startswith(f"{INTERFACE}:")).split()
    num_bytes, num_packets = int(fields[9]), int(fields[10])
    return num_bytes - HEADERS * num_packets
