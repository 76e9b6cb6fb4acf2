"""Everything that talks MPI, or takes its place. No other package imports mpi4py, and no arithmetic lives here."""

import multiprocessing

import mpi4py

if multiprocessing.parent_process() is not None:  # a DataLoader's worker, say: it is no rank
    mpi4py.rc.initialize = mpi4py.rc.finalize = False

from mpilsgd.comm.baton import Deadlock, WorkerFailed
from mpilsgd.comm.bell import Bell
from mpilsgd.comm.channel import Channel
from mpilsgd.comm.counting import Counter, Progress, progresses_alone, thread_problem
from mpilsgd.comm.ending import Refused, end_job, exit_status
from mpilsgd.comm.heartbeat import Heartbeat
from mpilsgd.comm.inprocess import in_process
from mpilsgd.comm.links import Edge, Inbox, Links, Outbox, Slot, tag_problem
from mpilsgd.comm.mpi import MPI, NoMPI, here
from mpilsgd.comm.onesided import Turns
from mpilsgd.comm.shards import Shard, Shards
from mpilsgd.comm.snapshots import Snapshots
from mpilsgd.comm.standstill import Place
from mpilsgd.comm.topology import Topology
from mpilsgd.comm.waiting import Background, clock, complete, pause, reads, result, seconds, wait_until
from mpilsgd.comm.windows import Window, free_shared_memory

__all__ = [
    "MPI",
    "Background",
    "Bell",
    "Channel",
    "Counter",
    "Deadlock",
    "Edge",
    "Heartbeat",
    "Inbox",
    "Links",
    "NoMPI",
    "Outbox",
    "Place",
    "Progress",
    "Refused",
    "Shard",
    "Shards",
    "Slot",
    "Snapshots",
    "Topology",
    "Turns",
    "Window",
    "WorkerFailed",
    "clock",
    "complete",
    "end_job",
    "exit_status",
    "free_shared_memory",
    "here",
    "in_process",
    "pause",
    "progresses_alone",
    "reads",
    "result",
    "seconds",
    "tag_problem",
    "thread_problem",
    "wait_until",
]
