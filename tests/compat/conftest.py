"""These tests need the packages of the optional group `compat`: `make compat`. The ordinary suites leave them out."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if "not full" in config.option.markexpr else None
