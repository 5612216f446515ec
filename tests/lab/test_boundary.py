"""The laboratory imports the library, never the other way round, and the wheel holds none of it."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[2]
OURS = {"lab", "benchmarks", "tests", "support"}


@pytest.mark.parametrize("package", ["tokenreduce", "adapters/tokenreduce_adapters"])
def test_nothing_in_the_wheel_imports_what_is_not(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            assert not OURS & {name.partition(".")[0] for name in names}, f"{file}:{getattr(node, 'lineno', 0)}"


def test_the_wheel_holds_the_library_and_the_adapters_alone() -> None:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"][
        "find"
    ]
    packages = [
        name for folder in found["where"] for name in find_packages(str(ROOT / folder), include=found["include"])
    ]
    assert {name.partition(".")[0] for name in packages} == {"tokenreduce", "tokenreduce_adapters"}
    assert "tokenreduce.testbed" in packages
