"""What is public: the names of `tokenreduce` and `tokenreduce.plugin`, and nothing else in examples and documents."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import tokenreduce as tr
from tokenreduce import plugin

ROOT = Path(__file__).parents[2]
CONTRACTS = {
    "adapter", "amounts", "errors", "hookspecs", "layout", "ops.carry", "ops.groups", "reduction", "strategy", "trace", "vision",
}  # fmt: skip
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IMPORT = re.compile(r"^ *(?:from tokenreduce\S* import .*|import tokenreduce.*)$", re.MULTILINE)
EXAMPLE = sorted((ROOT / "examples").rglob("*.py"))
OURS = [*sorted((ROOT / "tokenreduce" / "strategies").rglob("*.py")), *sorted((ROOT / "adapters").rglob("*.py"))]
PUBLIC = {
    "tokenreduce": {*tr.__all__, "plugins"},
    "tokenreduce.plugin": set(plugin.__all__),
    "tokenreduce.compare": set(importlib.import_module("tokenreduce.compare").__all__),
    "tokenreduce.testbed": set(importlib.import_module("tokenreduce.testbed").__all__),
    # Named on docs/media.md: a model's own count of frames, and the frames themselves.
    "tokenreduce.media.video": {"read_clip", "sample_indices", "video_info"},
}


def imports(text: str) -> Iterator[tuple[str, str]]:
    """(module, name) of each import of tokenreduce's."""
    for node in ast.walk(ast.parse(textwrap.dedent(text))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "tokenreduce":
            yield from ((node.module or "", name.name) for name in node.names)
        if isinstance(node, ast.Import):
            yield from ((name.name, "") for name in node.names if name.name.split(".")[0] == "tokenreduce")


def shown(page: Path) -> list[tuple[str, str]]:
    """What the code on a page imports, from lines of their own."""
    return list(imports("\n".join(line.strip() for line in IMPORT.findall(page.read_text()))))


# tokenreduce ----------------------------------------------------------------------------------------------------------


def test_dir_shows_the_public_names() -> None:
    names = dir(tr)
    assert [name for name in names if not name.startswith("__")] == sorted(tr.__all__)
    assert {"__all__", "__doc__", "__version__"} <= set(names)
    assert {"attach", "detach"}.isdisjoint(names)  # Deprecated.
    for name in tr.__all__:
        assert inspect.getdoc(getattr(tr, name)), name


def test_a_name_that_is_not_there_names_the_nearest() -> None:
    with pytest.raises(
        AttributeError, match=r"^module 'tokenreduce' has no attribute 'redcue'; did you mean 'reduce'\?"
    ):
        _ = tr.redcue
    assert not hasattr(tr, "nothing_like_it")


def test_help_shows_the_arguments_of_reduce() -> None:
    signature = inspect.signature(tr.reduce)
    assert list(signature.parameters) == ["model", "pipeline", "budget", "layout", "on_infeasible"]
    assert signature.return_annotation == "Run"
    for parameter in signature.parameters.values():
        assert parameter.annotation not in (inspect.Parameter.empty, "Any")
        assert f"{parameter.name}:" in (tr.reduce.__doc__ or "")


# tokenreduce.plugin ---------------------------------------------------------------------------------------------------


def test_every_name_of_plugin_is_there_and_documented() -> None:
    assert plugin.__all__ == sorted(plugin.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))
    for name in plugin.__all__:
        value = getattr(plugin, name)
        assert f"`{name}`" in (plugin.__doc__ or ""), f"{name} is not in the list of what is stable"
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
    listed = set(re.findall(r"`([A-Za-z]\w+)`", plugin.__doc__ or ""))
    assert listed - set(plugin.__all__) == {"decide", "forecast", "schedule", "carry"}


def test_plugin_imports_the_contracts_alone() -> None:
    found = {module for module, _ in imports(Path(plugin.__file__).read_text())}
    assert found == {f"tokenreduce.{name}" for name in CONTRACTS}


def test_our_own_strategies_and_adapters_need_no_more_of_the_contracts() -> None:
    used = {
        name
        for file in OURS
        for module, name in imports(file.read_text())
        if module.removeprefix("tokenreduce.") in CONTRACTS
    }
    assert len(used) > 20
    # Methods of the `ctx` offer these two; ours also call the functions behind them, on groups of their own making.
    assert used - {"grouped", "shared"} <= set(plugin.__all__)


# Examples and documents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", EXAMPLE, ids=lambda file: file.name)
def test_the_example_imports_plugin_alone(file: Path) -> None:
    found = list(imports(file.read_text()))
    assert found
    assert {module for module, _ in found} == {"tokenreduce.plugin"}
    assert {name for _, name in found} <= set(plugin.__all__)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_documents_import_public_names_alone(page: Path) -> None:
    for module, name in shown(page):
        assert module in PUBLIC, f"{page.name} imports {module}"
        assert not name or name in PUBLIC[module], f"{page.name} imports {name} from {module}"
    assert set(re.findall(r"\btr\.(\w+)", page.read_text())) <= {*tr.__all__, "attach", "detach"}


@pytest.mark.parametrize("name", ["plugins", "adapters"])
def test_pages_for_authors_import_plugin_alone(name: str) -> None:
    """Beside `import tokenreduce as tr` and the manager to register with."""
    found = shown(ROOT / "docs" / f"{name}.md")
    assert len([module for module, _ in found if module == "tokenreduce.plugin"]) >= 2
    assert {(module, other) for module, other in found if module != "tokenreduce.plugin"} <= {
        ("tokenreduce", ""),
        ("tokenreduce", "plugins"),
    }
