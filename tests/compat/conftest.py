"""These tests need the packages of the optional group `compat`: `make compat`. The ordinary suites leave them out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")  # the one that patch_keras is for


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if "not full" in config.option.markexpr else None
