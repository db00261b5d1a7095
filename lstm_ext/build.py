"""python -m lstm_ext.build: compiles the extension for the torch and the Python that run this, once.

It takes a minute or two and needs a C++ compiler, ninja and setuptools. Later processes find the result in the cache
folder (TORCH_EXTENSIONS_DIR). If a library that fits is installed, nothing is compiled. LSTM_EXT_CUDA=1 compiles the
CUDA kernels, too, which a wheel has not; see "Environment variables" in the documentation.

The exit code is 0 if there is a library that fits, and 1 with one line on stderr if there is none.
"""

from __future__ import annotations

import sys

from .native import config, loader

__all__ = ["main"]


def main() -> int:
    if sys.argv[1:]:
        print(f"lstm_ext.build: expected no arguments, got {' '.join(sys.argv[1:])}", file=sys.stderr)
        return 2
    try:
        status, was_built = loader.build(lambda line: print(line, flush=True))
    except (config.BuildError, ImportError, ValueError) as error:
        print(f"lstm_ext.build: error: {error}", file=sys.stderr)
        return 1
    print(f"CUDA kernels: {status.cuda or ', '.join(filter(None, ['none', status.cuda_reason]))}")
    print(f"{'built' if was_built else 'nothing to build'}: {status.path}, for torch {status.torch_version}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
