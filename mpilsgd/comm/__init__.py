"""Everything that talks MPI. No other package of mpilsgd imports mpi4py, and no arithmetic lives here."""

from mpilsgd.comm.bell import Bell
from mpilsgd.comm.fabric import Fabric, Level, SharedMemoryWarning, exhaust
from mpilsgd.comm.heartbeat import Heartbeat
from mpilsgd.comm.links import Inbox, Links, Outbox, Slot, tag_problem
from mpilsgd.comm.onesided import Counter, Progress, Turns, thread_problem
from mpilsgd.comm.shards import Shard, Shards
from mpilsgd.comm.snapshots import Snapshots
from mpilsgd.comm.standstill import Place
from mpilsgd.comm.topology import Topology, end_job, exit_status
from mpilsgd.comm.waiting import Background, wait_until
from mpilsgd.comm.windows import Window, free_shared_memory

__all__ = [
    "Background",
    "Bell",
    "Counter",
    "Fabric",
    "Heartbeat",
    "Inbox",
    "Level",
    "Links",
    "Outbox",
    "Place",
    "Progress",
    "Shard",
    "Shards",
    "SharedMemoryWarning",
    "Slot",
    "Snapshots",
    "Topology",
    "Turns",
    "Window",
    "end_job",
    "exhaust",
    "exit_status",
    "free_shared_memory",
    "tag_problem",
    "thread_problem",
    "wait_until",
]
