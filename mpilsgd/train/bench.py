"""`mpilsgd bench`: the arithmetic and the exchanges against what one would write without mpilsgd."""

from __future__ import annotations

import argparse
import sys

from mpilsgd.train.numbers import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `mpilsgd bench`."""
    parser.description = (
        "Measures mpilsgd against plain torch, MPI and gloo in one run and prints ratios of medians, "
        "with the project's targets beside them. A benchmark does not fail."
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="{kernels,exchange}")
    kernels = parts.add_parser(
        "kernels",
        help="the updates in one process: mpilsgd bench kernels",
        description="Every update in one pass against torch's separate operations: time, bandwidth, memory.",
    )
    kernels.add_argument("--size", type=count, default=64_000_000, help="elements (default: 64e6)")
    kernels.add_argument(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        default="float32",
        help="(default: float32)",
    )
    kernels.add_argument("--threads", type=count, help="torch threads (default: as torch has them)")
    exchange = parts.add_parser(
        "exchange",
        help="the exchanges between ranks: mpiexec -n 4 mpilsgd bench exchange",
        description="A round of each method against Bcast, Allreduce and gloo, and the memory it holds; on GPUs, where "
        "one rank will do, through the node's device memory and by messages, against NCCL and a copy. "
        "Start it with a launcher: mpiexec -n 4 mpilsgd bench exchange",
    )
    exchange.add_argument(
        "--bytes",
        type=count,
        default=40_000_000,
        help="model size in bytes (default: 40e6); 4e3 shows what a round costs beside its bytes",
    )
    exchange.add_argument(
        "--cuda_aware",
        "--cuda-aware",
        action="store_true",
        help="with --device cuda: give GPUs' memory to MPI whatever it says of itself, untried; it may crash",
    )
    for part, repetitions in ((kernels, 11), (exchange, 21)):
        part.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
        part.add_argument(
            "--repetitions",
            type=count,
            default=repetitions,
            metavar="N",
            help=f"interleaved repetitions, of which the median counts (default: {repetitions})",
        )


def run(args: argparse.Namespace) -> int:
    """Runs one part; exit status 0, or 2 where it cannot run (no CUDA device, one rank)."""
    try:
        if args.part == "kernels":
            from mpilsgd.train import bench_kernels

            return bench_kernels.run(args)
        from mpilsgd.train import bench_exchange

        return bench_exchange.run(args)
    except BrokenPipeError:  # `mpilsgd bench kernels | head`
        sys.stderr.close()
        return 0
