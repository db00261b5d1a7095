"""Every run of the exchange between blocks, by exploring all states of a small model with the values they carry.

The emulator samples orders of events; here, for two and three blocks, each of them is gone through, and what a reader
takes is compared with what was written. In tests/:

    python -m simt.protocol_model                       explores all configurations, and says how many states they have
    python -m simt.protocol_model --plant "no memset"   plants a fault, says what leads to it, and ends with 1
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace

from simt.exploration import explore
from simt.mailbox_model import CONFIGURATIONS, PLANTS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plant", choices=PLANTS, metavar="NAME", help=f"one of: {', '.join(PLANTS)}")
    chosen = parser.parse_args(arguments).plant
    models = [replace(PLANTS[chosen][0], plant=chosen)] if chosen else CONFIGURATIONS
    for model in models:
        began = time.perf_counter()
        found = explore(model.model())
        seconds = time.perf_counter() - began
        print(f"{model}: {found.states} states, {seconds:.1f} s", flush=True)
        if found.fault:
            print("\n".join(f"    {event}" for event in found.trace))
            print(f"FAULT: {found.fault}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
