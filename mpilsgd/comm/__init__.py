"""Everything that talks MPI. No other package of mpilsgd imports mpi4py, and no arithmetic lives here."""

from mpilsgd.comm.fabric import Fabric, Level
from mpilsgd.comm.topology import Topology
from mpilsgd.comm.windows import Window

__all__ = ["Fabric", "Level", "Topology", "Window"]
