"""Kernels of one instruction each, in PTX by hand, with results that do not come from the emulator.

The kernel of a case puts one 64-bit number a thread into `out`. Expected numbers are written down, or follow in exact
arithmetic from what the PTX manual says.
"""

from simt.ptx_cases import arithmetic, memory
from simt.ptx_cases.case import CASES, Case, module

__all__ = ["CASES", "Case", "arithmetic", "memory", "module"]
