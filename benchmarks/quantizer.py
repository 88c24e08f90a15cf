"""How fast is the quantiser beside a copy of the same gradient? Prints a table.

    python benchmarks/quantizer.py [--repeats 30] [--threads 1 2] [--bits 8 4]
    python benchmarks/quantizer.py --whole                # one L2 norm for all, as in the paper
    python benchmarks/quantizer.py --device cuda --threads 1
    python benchmarks/quantizer.py --workers 2 4 8 16 64 256 [--eager]

The gradient is 11.7 M floats laid out as timm's ResNet-18 in the order of DDP's buckets (last
parameter first). Speeds are GB/s of fp32 gradient: the median over repetitions in which clone,
copy, encode and decode take turns, so that other work on the machine slows all of them. `clone`
allocates its result as encode and decode do, hence pays for page faults; `copy` writes to memory
that exists. With `warm`, encode and decode do too (`out=`). Compile time is that of the first call.

With `--workers`, the work of one of so many workers instead: what it encodes for all servers, what
it averages as a server and encodes again, and what it decodes of all servers' replies, without the
network. To encode and to decode should take the same for any number of workers.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
from _clock import seconds

from robust_accel.comm.collectives import _slices
from robust_accel.comm.draws import random_key
from robust_accel.comm.layout import Segment, segment
from robust_accel.comm.quantizer import Message, Quantizer


def gradient() -> tuple[torch.Tensor, list[Segment]]:
    """Values [d] and the parameters that they belong to."""
    segments, position = [], 0
    for _, parameter in timm.create_model("resnet18").named_parameters():
        segments.append(segment(parameter.shape, position))
        position += parameter.numel()
    return torch.randn(position, generator=torch.Generator().manual_seed(0)), segments[::-1]


def worker_seconds(q: Quantizer, num: int, repeats: int) -> dict[str, float]:
    """Median seconds of each stage, for one of `num` workers; a slice is a gradient of 2 M."""
    flat, segments = gradient()
    key = random_key(0, 0, 0, flat.device)
    slices = _slices(segments, q.block_size)
    values = flat.split([sum(s.size for s in members) for members in slices])
    times: dict[str, list[float]] = {"encode": [], "serve": [], "decode": []}
    for _ in range(repeats):
        spent = dict.fromkeys(times, 0.0)
        for x, members in zip(values, slices, strict=True):
            start = time.perf_counter()
            message = q.encode_parts(x, members, key, num)
            spent["encode"] += time.perf_counter() - start
            # its own part of every worker's message: here of one worker, so many times
            received = Message(*(plane[:1].expand(num, -1).contiguous() for plane in message))
            start = time.perf_counter()
            reply = q.encode_part(q.mean_of_part(received, members, x), members, key, 0, num)
            spent["serve"] += time.perf_counter() - start
            replies = Message(*(plane.expand(num, -1).contiguous() for plane in reply))
            start = time.perf_counter()
            q.decode_parts(replies, members, x)
            spent["decode"] += time.perf_counter() - start
        for name, seconds_of in spent.items():
            times[name].append(seconds_of)
    return {name: median(t[1:]) for name, t in times.items()}  # the first is a warm-up


def by_workers(numbers: list[int], repeats: int, compiled: bool) -> None:
    """Print a table: milliseconds of each stage, and relative to the first number of workers."""
    torch.set_num_threads(1)
    q = Quantizer(8, compile=compiled)
    print(f"8 bits, one thread, {'compiled' if compiled else 'eager'}; milliseconds")
    print("| workers | encode | serve | decode | all | of the first |")
    print("| --- | --- | --- | --- | --- | --- |")
    first = None
    for num in numbers:
        found = worker_seconds(q, num, repeats)
        total = sum(found.values())
        first = first or total
        cells = [f"{1e3 * t:.1f}" for t in (*found.values(), total)]
        print(f"| {num} | {' | '.join(cells)} | {total / first:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--whole", action="store_true", help="one L2 norm for the whole gradient")
    parser.add_argument("--workers", type=int, nargs="+", help="the work of one of so many")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--eager", action="store_true", help="with --workers: not compiled")
    args = parser.parse_args()
    if args.workers and args.whole:
        parser.error("--workers is of blocks: leave out --whole")
    if args.workers:
        by_workers(args.workers, args.repeats, not args.eager)
        return

    flat, segments = gradient()
    if args.whole:
        segments = [Segment(len(flat), 0, raw=False)]
    flat = flat.to(args.device)
    key = random_key(0, 0, 0, flat.device)
    warm = torch.empty_like(flat)
    where = "CPU" if flat.device.type == "cpu" else torch.cuda.get_device_name(flat.device)
    print(f"{flat.numel() / 1e6:.1f} M floats, torch {torch.__version__}, {where}")
    print("median (fastest) GB/s")
    for threads in args.threads:
        torch.set_num_threads(threads)
        for bits in args.bits:
            q = Quantizer(bits, block_size=256 if bits >= 8 else 128, compile=True)
            if args.whole:
                q = Quantizer(bits, "l2", None, compile=True)
            compile_seconds = seconds(lambda q=q: q.encode(flat, segments, key), flat.device)
            message = q.encode(flat, segments, key)
            jobs: dict[str, Callable[[], object]] = {
                "clone": lambda: flat.clone(),
                "encode": lambda q=q: q.encode(flat, segments, key),
                "decode": lambda q=q, m=message: q.decode(m, segments),
                "copy (warm)": lambda: warm.copy_(flat),
                "encode (warm)": lambda q=q, m=message: q.encode(flat, segments, key, out=m),
                "decode (warm)": lambda q=q, m=message: q.decode(m, segments, out=warm),
            }
            times: dict[str, list[float]] = {name: [] for name in jobs}
            for _ in range(args.repeats):
                for name, job in jobs.items():
                    times[name].append(seconds(job, flat.device))
            print(f"\n{bits} bits, {threads} thread(s), first call {compile_seconds:.1f} s")
            for name, t in times.items():
                reference = times["copy (warm)" if "warm" in name else "clone"]
                speed, best = (flat.nbytes / x / 1e9 for x in (median(t), min(t)))
                ratio = median(r / x for r, x in zip(reference, t, strict=True))
                print(
                    f"  {name:14} {speed:6.2f} ({best:5.2f})   {1e3 * median(t):8.2f} ms   "
                    f"{ratio:5.2f} of the {'copy' if 'warm' in name else 'clone'}"
                )


if __name__ == "__main__":
    main()
