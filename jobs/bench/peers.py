"""What torch itself offers, on the data, models and seeds of `mpilsgd train`: DistributedDataParallel and PostLocalSGD.

    mpiexec -n 4 python -m mpi4py jobs/bench/peers.py ddp|postlocal [--option value ...]

takes the options of `mpilsgd train` (for postlocal, --period is that of the averages over all), talks by gloo, and
leaves a run directory that `mpilsgd report` draws beside those of mpilsgd. Communication is, of ddp, what a step takes
longer than one of the same model alone, measured on all ranks at once before the training; of postlocal, what its
optimizer takes longer than usual when it averages, and the wait for the slowest rank at an evaluation.
"""

from __future__ import annotations

import os
import socket
import statistics
import sys
import time
from collections import OrderedDict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from mpilsgd.comm import Topology
from mpilsgd.train import data, models, optimizers
from mpilsgd.train.command_line import parse
from mpilsgd.train.evaluation import evaluate
from mpilsgd.train.loop import steps_of
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.sampling import Sampler

_INNER = 4  # PostLocalSGD's smaller groups average this many times as often
_ALONE = 50  # steps that are taken without communication


def main(kind: str, options: list[str]) -> None:
    topology = Topology()
    rank, size = topology.world.rank, topology.world.size
    config = parse([*options, "--method", "LocalSGD"])
    torch.set_num_threads(config.threads or 1)
    join(topology)
    train, test = data.load(config.data, config.data_dir, config.augment, config.seed)
    sampler = Sampler(config.sampling, len(train), config.batch_size, rank, size, config.seed)
    model = models.build(config.model, train.input_shape, train.classes, config.seed)
    optimizer: Any = optimizers.build(config, model.parameters())
    alone = seconds_alone(config, train, sampler, topology)
    trained: torch.nn.Module = model
    inner = 1
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    else:
        period = int(config.method_options.get("period", 64))
        inner = period if size == 2 else max(1, period // _INNER)
        groups = OrderedDict([(inner, max(2, size // 2)), (period, size)])
        optimizer = PostLocalSGDOptimizer(optimizer, HierarchicalModelAverager(groups, warmup_steps=0))
    directory = RunDirectory(config.output or f"runs/{kind}")
    if rank == 0:
        directory.claim(config.text().replace("method: LocalSGD", f"method: {kind}"), overwrite=True)
    total = config.steps or (config.epochs or 1) * sampler.batches
    every = steps_of(config.eval_every, sampler.batches)
    wall = loaded = losses = 0.0
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    sent = 0
    result = None
    strides = [p.stride() for p in model.parameters()]
    updates: list[float] = []  # seconds of the optimizer's steps
    waited = 0.0  # for the slowest rank, at evaluations
    model.train()
    for step in range(total):
        epoch, batch = divmod(step, sampler.batches)
        if batch == 0:
            order = sampler.epoch(epoch)
        start = time.perf_counter()
        inputs, targets = train.batch(order[batch], sampler.augmentation(epoch, batch))
        at = time.perf_counter()
        optimizer.zero_grad()
        loss = functional.cross_entropy(trained(inputs), targets)
        loss.backward()
        computed = time.perf_counter()
        optimizer.step()
        updates.append(time.perf_counter() - computed)
        for p, stride in zip(model.parameters(), strides, strict=True):
            if p.stride() != stride:  # averaging forgets the memory format, and with it the speed
                p.data = torch.empty_strided(p.shape, stride, dtype=p.dtype, device=p.device).copy_(p.data)
        losses += loss.item()
        end = time.perf_counter()
        wall, loaded = wall + end - start, loaded + at - start
        sent += nbytes if kind == "ddp" or (step + 1) % period == 0 else 0
        if (step + 1) % every and step + 1 < total:
            continue
        result = centre(kind, model, test, topology)
        averages = updates[::inner]
        averaging = sum(averages) - len(averages) * statistics.median(updates)
        walls = topology.allgather((wall, loaded, losses, waited + averaging))
        latest = max(row[0] for row in walls)
        waited, wall = waited + latest - wall, latest
        if rank == 0:
            means = [sum(column) / size for column in zip(*walls, strict=True)]
            row = {
                "step": step + 1,
                "epoch": (step + 1) / sampler.batches,
                "wall_s": wall,
                "grad_evals": size * (step + 1),
            }
            row |= {"rounds": sent // nbytes, "bytes_group": 0, "bytes_across": 2 * (size - 1) * sent}
            row |= {
                "train_loss": means[2] / every,
                "test_loss": result.loss,
                "test_error": result.error,
                "leader": None,
            }
            compute = alone * (step + 1) if kind == "ddp" else means[0] - means[1] - means[3]
            compute = min(compute, wall - means[1])
            row |= {"t_compute": compute, "t_data": means[1], "t_comm": wall - means[1] - compute}
            directory.append("metrics.jsonl", [row])
            print(f"step {step + 1}  {wall:.1f} s  test error {100 * result.error:.2f} %", flush=True)
        losses = 0.0
    if rank == 0 and result is not None:
        directory.summarize(
            {
                "method": kind,
                "world_size": size,
                "steps": total,
                "grad_evals": size * total,
                "test_error": result.error,
                "test_loss": result.loss,
                "wall_s": wall,
                "bytes_across": 2 * (size - 1) * sent,
            }
        )
    dist.destroy_process_group()
    topology.free()


def seconds_alone(config: Any, train: Any, sampler: Sampler, topology: Topology) -> float:
    """The median of a step's seconds without communication and without loading, the mean of the ranks."""
    model = models.build(config.model, train.input_shape, train.classes, config.seed)
    optimizer = optimizers.build(config, model.parameters())
    inputs, targets = train.batch(sampler.epoch(0)[0], sampler.augmentation(0, 0))
    taken = []
    topology.allgather(None)
    for _ in range(_ALONE):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
        loss.item()
        taken.append(time.perf_counter() - start)
    return statistics.mean(topology.allgather(statistics.median(taken)))


def join(topology: Topology) -> None:
    """The process group, over the address under which rank 0's host is known."""
    host, port = None, None
    if topology.world.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            host, port = socket.gethostname(), probe.getsockname()[1]
    host, port = topology.broadcast((host, port))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", os.environ.get("PEERS_INTERFACE", ""))
    if not os.environ["GLOO_SOCKET_IFNAME"]:
        del os.environ["GLOO_SOCKET_IFNAME"]
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{host}:{port}",
        rank=topology.world.rank,
        world_size=topology.world.size,
        timeout=timedelta(seconds=300),
    )


def centre(kind: str, model: torch.nn.Module, test: Any, topology: Topology) -> Any:
    """Evaluates the mean of the workers; of ddp they are equal."""
    own = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters() if kind == "postlocal" else ():
            dist.all_reduce(p)
            p /= topology.world.size
        result = evaluate(model, test, topology)
        for p, before in zip(model.parameters(), own, strict=True):
            p.copy_(before)
    return result


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("ddp", "postlocal"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
