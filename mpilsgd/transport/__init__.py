"""Where the others' vectors lie, and how bytes move: shared windows within a node, messages between islands."""

from mpilsgd.transport.fabric import Fabric, Level, Traffic, exhaust
from mpilsgd.transport.sharing import SharedMemoryWarning
from mpilsgd.transport.wire import Stream, Wire

__all__ = ["Fabric", "Level", "SharedMemoryWarning", "Stream", "Traffic", "Wire", "exhaust"]
