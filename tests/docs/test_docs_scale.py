"""The arithmetic of docs/scale.md is what `python benchmarks/node.py` prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_every_line_that_the_program_prints() -> None:
    child = subprocess.run(
        [sys.executable, "benchmarks/node.py"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert child.returncode == 0, child.stderr
    printed = [line for line in child.stdout.splitlines() if line]
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8").splitlines()
    assert len(printed) > 12
    assert [line for line in printed if line not in page] == []
