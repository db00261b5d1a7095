"""The driver of README.md runs on the emulator, by the snippet that stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from simt import build

pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
]

README = Path(__file__).with_name("README.md")


def test_the_driver_of_the_readme(tmp_path: Path) -> None:
    text = README.read_text()
    (driver,) = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "reverse_driver.cpp"
    path.write_text(driver)
    assert snippet.count('"tests/simt/reverse_driver.cpp"') == 1
    exec(snippet.replace('"tests/simt/reverse_driver.cpp"', repr(str(path))), {})
