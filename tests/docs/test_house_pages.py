"""The pages that carry people on are true: rooms, files and names that they speak of exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import tokenreduce

ROOT = Path(__file__).parents[2]
PAGES = (
    "AGENTS.md",
    "CONTRIBUTING.md",
    "README.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "docs/architecture.md",
    "docs/glossary.md",
)
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def folders(place: Path) -> set[str]:
    """Names of the folders in `place` that hold something of ours, but those of data."""
    data = {"data", "weights", "templates", "__pycache__"}
    return {path.name for path in place.iterdir() if path.is_dir() and path.name not in data and any(path.iterdir())}


def picture() -> list[tuple[int, str]]:
    """(indentation, room) of every line of the picture."""
    (drawn,) = re.findall(r"^```text\n(adapters/.*?)^```$", ARCHITECTURE, re.M | re.S)
    return [
        (len(line) - len(line.lstrip()), room) for line in drawn.splitlines() for room in re.findall(r"([a-z]+)/", line)
    ]


def test_the_picture_has_the_rooms_of_the_library() -> None:
    rooms = picture()
    assert {room for indent, room in rooms if indent == 2} == folders(ROOT / "tokenreduce")
    inner = {room for indent, room in rooms if indent == 4}
    assert inner == folders(ROOT / "tokenreduce" / "engine") | folders(ROOT / "tokenreduce" / "strategies")
    assert {room for indent, room in rooms if indent == 0} == {"tokenreduce", "adapters", "lab", "benchmarks"}


def test_the_order_of_the_rooms_is_that_of_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for container, indent in (("tokenreduce", 2), ("tokenreduce.engine", 4)):
        (layers,) = (each["layers"] for each in contracts if each.get("containers") == [container])
        place = {name.strip(): number for number, layer in enumerate(layers) for name in layer.split("|")}
        drawn = [room for at, room in picture() if at == indent and room in place]
        if indent == 4:
            drawn = drawn[: len(folders(ROOT / "tokenreduce" / "engine"))]
        order = [place[room] for room in drawn]
        assert order == sorted(order), drawn


def test_every_room_says_what_lives_there() -> None:
    for folder in [ROOT / "tokenreduce" / room for room in folders(ROOT / "tokenreduce") - {"presets"}]:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = {
        path
        for path in re.findall(r"[\w./-]+", text)
        if re.fullmatch(r"(tokenreduce|adapters|tests|docs|lab)/[\w./-]+\.\w+", path)
    }
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_names_in_the_walk_are_defined_where_it_says() -> None:
    walk = ARCHITECTURE[ARCHITECTURE.index("## One prefill") :]
    named = re.findall(r"`(tokenreduce/[\w/]+\.py)`, `(\w+)`", walk) + re.findall(
        r"`(\w+)` \(`(tokenreduce/[\w/]+\.py)`\)", walk
    )
    assert len(named) > 10
    for one, other in named:
        file, name = (one, other) if one.endswith(".py") else (other, one)
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        found = {node.name for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
        assert name in found, (file, name)
    methods = re.findall(r"`run\.py`, `(\w+)`", walk)
    assert methods
    assert all(hasattr(tokenreduce.Run, name) for name in methods)


def test_agents_md_is_short() -> None:
    assert len((ROOT / "AGENTS.md").read_text().splitlines()) < 60


def test_the_glossary_is_sorted_and_says_each_word_once() -> None:
    words = re.findall(r"^\| \*\*([^*]+)\*\*", (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8"), re.M)
    assert {"slot", "medium", "site", "stage", "span", "budget", "draft", "share", "look"} <= set(words)
    assert len(words) == len(set(words))


def test_citation_and_hooks_are_read() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["cff-version"], cited["version"], cited["license"]) == (
        "1.2.0",
        tokenreduce.__version__,
        "Apache-2.0",
    )
    assert cited["title"]
    assert cited["authors"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook["id"] for hook in hooks["repos"][0]["hooks"]] == ["ruff", "ruff-format", "mypy", "import-linter"]
    assert f"## {tokenreduce.__version__}" in (ROOT / "CHANGELOG.md").read_text()
