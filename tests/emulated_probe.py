"""`python -m mpilsgd.transport.probe` on the emulated device."""

import sys

import conftest  # noqa: F401  loads the extension with the emulated device
import emulated

from mpilsgd.transport import probe

with emulated.Emulation():
    sys.exit(probe.main(lambda: emulated.DEVICE))
