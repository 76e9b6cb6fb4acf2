"""What others offer, on the data, models and seeds of `mpilsgd train`: DistributedDataParallel and PostLocalSGD.
Also torchft's DiLoCo, where torchft is installed beside mpilsgd.

    mpiexec -n 4 python -m mpi4py jobs/bench/peers.py ddp|postlocal|torchft [--option value ...]

takes the options of `mpilsgd train` (for postlocal, --period is that of the averages over all; for torchft, those of
DiLoCo without fragments), talks by gloo, and leaves a run directory that `mpilsgd report` draws beside those of ours.
Communication is, of ddp, what a step takes longer than one of the same model alone, measured on all ranks at once
before the training; of the others, what the optimizer takes longer than usual when it communicates, and the wait for
the slowest rank at an evaluation.
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
from mpilsgd.train.events import steps_of
from mpilsgd.train.run_directory import RunDirectory
from mpilsgd.train.sampling import Sampler

_INNER = 4  # PostLocalSGD's smaller groups average this many times as often
_ALONE = 50  # steps that are taken without communication


def main(kind: str, options: list[str]) -> None:
    topology = Topology()
    rank, size = topology.world.rank, topology.world.size
    method = "DiLoCo" if kind == "torchft" else "LocalSGD"
    config = parse([*options, "--method", method])
    torch.set_num_threads(config.threads or 1)
    join(topology)
    train, test = data.load(config.data, config.data_dir, config.augment, config.seed)
    sampler = Sampler(config.sampling, len(train), config.batch_size, rank, size, config.seed)
    model = models.build(config.model, train.input_shape, train.classes, config.seed)
    optimizer: Any = optimizers.build(config, model.parameters())
    alone = seconds_alone(config, train, sampler, topology)
    trained: torch.nn.Module = model
    period = int(config.method_options.get("period", 64))
    talks: set[int] = {0}  # steps in which the optimizer communicates, modulo `inner`
    inner = 1
    if kind == "ddp":
        trained = DistributedDataParallel(model)
    elif kind == "torchft":
        inner = period
        peer = Torchft(topology, model, optimizer, period, config.method_options)
        talks = {period - 1, period - 1 - int(config.method_options.get("overlap", 0))}
    else:
        inner = period if size == 2 else max(1, period // _INNER)
        groups = OrderedDict([(inner, max(2, size // 2)), (period, size)])
        optimizer = PostLocalSGDOptimizer(optimizer, HierarchicalModelAverager(groups, warmup_steps=0))
    directory = RunDirectory(config.output or f"runs/{kind}")
    if rank == 0:
        directory.claim(config.text().replace(f"method: {method}", f"method: {kind}"), overwrite=True)
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
        averages = [seconds for k, seconds in enumerate(updates) if k % inner in talks]
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
    if kind == "torchft":
        peer.end(topology)
    dist.destroy_process_group()
    topology.free()


class Torchft:
    """torchft's DiLoCo around an optimizer: every rank is a replica group of its own, rank 0 runs the lighthouse."""

    def __init__(
        self, topology: Topology, model: torch.nn.Module, optimizer: Any, period: int, options: dict[str, Any]
    ):
        from torchft import Manager, ProcessGroupGloo
        from torchft.coordination import LighthouseServer
        from torchft.local_sgd import DiLoCo

        rank, size, host = topology.world.rank, topology.world.size, socket.gethostname()
        self._lighthouse, address = None, None
        if rank == 0:
            self._lighthouse = LighthouseServer(bind="[::]:0", min_replicas=size, join_timeout_ms=60_000)
            address = f"http://{host}:{self._lighthouse.address().rsplit(':', 1)[1]}"
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._manager = Manager(
            pg=ProcessGroupGloo(timeout=timedelta(seconds=300)),
            load_state_dict=model.load_state_dict,
            state_dict=model.state_dict,
            min_replica_size=size,
            use_async_quorum=False,
            timeout=timedelta(seconds=300),
            quorum_timeout=timedelta(seconds=300),
            rank=0,
            world_size=1,
            store_addr=host,
            store_port=self._store.port,
            lighthouse_addr=topology.broadcast(address),
            replica_id=f"{rank}",
            hostname=host,
            init_sync=False,  # the seeds are equal
        )
        outer = torch.optim.SGD(
            model.parameters(),
            lr=float(options.get("outer_lr", 0.7)),
            momentum=float(options.get("outer_momentum", 0.9)),
            nesterov=True,
        )
        self._diloco = DiLoCo(
            self._manager,
            [model],
            optimizer,
            outer,
            sync_every=period,
            fragment_sync_delay=int(options.get("overlap", 0)),
            fragment_update_alpha=float(options.get("mixing", 0)),
        )
        self._diloco.__enter__()

    def end(self, topology: Topology) -> None:
        self._diloco.__exit__(None, None, None)
        topology.allgather(None)
        self._manager.shutdown(wait=False)
        topology.allgather(None)
        if self._lighthouse is not None:
            self._lighthouse.shutdown()


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
        for p in model.parameters() if kind != "ddp" else ():
            dist.all_reduce(p)
            p /= topology.world.size
        result = evaluate(model, test, topology)
        for p, before in zip(model.parameters(), own, strict=True):
            p.copy_(before)
    return result


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("ddp", "postlocal", "torchft"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
