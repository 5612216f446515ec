"""Every code block of the documents runs as it is printed, or says above itself what it needs that is not here."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from support.videos import write_timed

from tokenreduce import plugins
from tokenreduce.cli import application, main
from tokenreduce.pipeline import pipeline_problems

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "plugin_package" / "README.md"]
FENCE = re.compile(r"(?:^\*Needs (?P<needs>[^\n]+)\.\*\n\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
NEEDY = 5
"""Blocks that need something that is not here. A new one has to be counted here."""
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
TESTED_ELSEWHERE = {"docs/adapters.md": "tests/docs/test_docs_adapters.py"}
"""Pages whose Python needs more than running: the test that does it."""


@dataclass(frozen=True)
class Block:
    """A fenced block: what it is written in, what it says that it needs, its text, and where it stands."""

    kind: str
    needs: str
    text: str
    place: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = str(page.relative_to(ROOT))
    return [
        Block(m["kind"], m["needs"] or "", m["text"], f"{name}:{text[: m.start('text')].count(chr(10)) + 1}")
        for m in FENCE.finditer(text)
    ]


ALL = {str(page.relative_to(ROOT)): blocks(page) for page in PAGES}


def having(*kinds: str) -> list[str]:
    """Pages with a block of one of these kinds."""
    return [name for name, found in ALL.items() if any(block.kind in kinds for block in found)]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the documents speak of."""
    folder = tmp_path_factory.mktemp("documents")
    write_timed(folder / "clip.mp4", "mpeg4", range(0, 8000, 500), size=(96, 96))
    mine = next(block.text for block in ALL["README.md"] if block.kind == "yaml")
    for name in ("mine.yaml", "my.yaml", "my_pipeline.yaml"):
        (folder / name).write_text(mine)
    return folder


@pytest.fixture(scope="module")
def given(room: Path) -> dict[str, Any]:
    """The names that pages take as given: those of the README's first block, and `path`."""
    scope: dict[str, Any] = {"path": str(room / "clip.mp4"), "torch": torch}
    first = next(block for block in ALL["README.md"] if block.kind == "python")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.chdir(room)
        exec(compile(first.text, first.place, "exec"), scope)
    assert "pipeline framefusion" in out.getvalue()
    return scope


def commands(block: Block) -> list[list[str]]:
    """The command lines of a shell block, split, without comments; of a console block those after `$`."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.kind == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def run_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a line; what installs or makes is looked up instead. Returns what it printed."""
    match words:
        case ["tokenreduce", *rest]:
            target = rest[rest.index(">") + 1] if ">" in rest else None
            assert main(rest[: rest.index(">")] if target else rest) == 0, (words, capsys.readouterr().err)
            out = capsys.readouterr().out
            if target:
                Path(target).write_text(out)
            return out
        case ["make", target, *rest]:
            assert target in TARGETS
            assert all(re.fullmatch(r"[A-Z]+=\w+", word) for word in rest)
        case ["pip", "install", *what]:  # test_wheel.py builds the wheel and installs it.
            assert all(word.startswith("dist/") or (ROOT / word.partition("[")[0]).exists() for word in what)
        case ["pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").exists()
        case _:
            raise AssertionError(f"no way to try: {' '.join(words)}")
    return ""


def test_every_block_says_what_it_is_in() -> None:
    found = [block for page in ALL.values() for block in page]
    assert len(found) > 30
    odd = [
        block.place for block in found if block.kind not in ("python", "sh", "console", "yaml", "toml", "json", "text")
    ]
    assert odd == []
    assert [
        block.place for block in found if block.kind == "text" and "tokenreduce " in block.text.split("\n")[0]
    ] == []


def test_few_blocks_need_what_is_not_here_and_their_commands_are_read() -> None:
    needy = [block for page in ALL.values() for block in page if block.needs]
    assert len(needy) == NEEDY, [block.place for block in needy]
    group: Any = typer.main.get_command(application())
    for block in needy:
        if block.kind == "python":
            compile(block.text, block.place, "exec")
        for words in commands(block) if block.kind == "sh" else []:
            assert words[0] == "tokenreduce"
            context = group.commands[words[1]].make_context(words[1], words[2:])  # Refuses unknown options.
            assert context.params


@pytest.mark.parametrize("page", having("python"))
def test_python_runs(page: str, room: Path, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if page in TESTED_ELSEWHERE:
        assert (ROOT / TESTED_ELSEWHERE[page]).is_file()
        return
    monkeypatch.chdir(room)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugin_package" / "src"))
    scope = given | {"__name__": "documents"}
    torch.manual_seed(0)
    try:
        for block in ALL[page]:
            if block.kind == "python" and not block.needs:
                exec(compile(block.text, block.place, "exec"), scope)
    finally:
        plugins.manager.cache_clear()


@pytest.mark.parametrize("page", having("sh", "console"))
def test_commands_run(
    page: str, room: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for file in room.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugin_package" / "src"))
    if "keep_largest_norm" in (ROOT / page).read_text():
        import tokenreduce_example_plugin

        plugins.manager().register(tokenreduce_example_plugin, "tokenreduce-example-plugin:example")
    try:
        for block in ALL[page]:
            if block.needs or block.kind not in ("sh", "console"):
                continue
            for words in commands(block):
                out = run_line(words, capsys)
                if block.kind == "console":
                    assert block.text == f"$ {shlex.join(words)}\n{out}", block.place
    finally:
        plugins.manager.cache_clear()


@pytest.mark.parametrize("page", having("yaml", "toml", "json"))
def test_data_is_what_it_claims_to_be(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "plugin_package" / "src"))
    import tokenreduce_example_plugin

    plugins.manager().register(tokenreduce_example_plugin, "tokenreduce-example-plugin:example")
    try:
        for block in ALL[page]:
            if block.kind == "toml":
                assert tomllib.loads(block.text)
            if block.kind == "json":
                assert json.loads(block.text)
            if block.kind == "yaml":
                data = yaml.safe_load(block.text)
                assert data, block.place
                if isinstance(data, dict) and "stages" in data:
                    assert pipeline_problems(data) == [], block.place
    finally:
        plugins.manager.cache_clear()
