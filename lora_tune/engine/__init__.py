"""Lanes of a trial pack on one frozen base model."""

import logging

# bitsandbytes warns on import about an optional kernel that this package never uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
