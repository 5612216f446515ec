"""Discovery of plugins: entry points of tiny distributions, conflicts, failures, the contract, turning them off."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from support.tiny import layout, logits, tiny_model

import tokenreduce as tr
from tokenreduce import plugins
from tokenreduce.adapter import ModelAdapter
from tokenreduce.errors import PipelineError, PluginError
from tokenreduce.hookspecs import hookimpl
from tokenreduce.pipeline import load_pipeline, pipeline_schema
from tokenreduce.plugins import DISABLE, PluginWarning
from tokenreduce.strategy import Capabilities, Decision, StageConfig, StageContext, Strategy

ROOT = Path(__file__).parents[2]
OURS = {"similarity_merge", "importance_prune", "fastv", "streaming_window", "random", "uniform_frames"}

STRATEGY = """
from typing import Literal
from tokenreduce.hookspecs import hookimpl
from tokenreduce.strategy import Capabilities, StageConfig, Strategy

class Keep(Strategy):
    '''Keep all.'''
    name = {name!r}
    capabilities = Capabilities(sites=("pre_attention",))

    class Config(StageConfig):
        strategy: Literal[{name!r}] = {name!r}

    def decide(self, ctx):
        return None

@hookimpl
def tokenreduce_strategies():
    return [Keep]
"""


Add = Callable[..., None]


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Add]:
    """Writes a distribution with one module and one entry point into a folder on sys.path."""

    def write(distribution: str, code: str, *, entry: str = "plugin") -> None:
        module = distribution.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[tokenreduce]\n{entry} = {module}\n")
        plugins.manager.cache_clear()

    monkeypatch.delenv(DISABLE, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    plugins.manager.cache_clear()
    yield write
    plugins.manager.cache_clear()
    for file in tmp_path.glob("*.py"):
        sys.modules.pop(file.stem, None)


class Plain(Strategy):
    """Keep all."""

    name = "plain_keep"
    capabilities = Capabilities(sites=("pre_attention",))

    class Config(StageConfig):
        strategy: Literal["plain_keep"] = "plain_keep"

    def decide(self, ctx: StageContext) -> Decision | None:
        return None


def register(*offered: Any, hook: str = "tokenreduce_strategies", result: Any = None) -> None:
    """Register an unnamed module's worth of hooks as the plugin `in-process`."""
    module = ModuleType("in_process")

    @hookimpl(specname=hook)
    def implementation() -> Any:
        return list(offered) if result is None else result

    setattr(module, hook, implementation)
    plugins.manager().register(module, "in-process")


def test_ours_are_found_with_their_origin(add: Add) -> None:
    assert set(plugins.strategies()) >= OURS
    assert {plugins.offered_strategies()[name].origin for name in OURS} == {"tokenreduce"}
    assert list(plugins.strategies()) == sorted(plugins.strategies())
    names = [adapter.name for adapter in plugins.adapters()]
    assert {"qwen2_vl", "llava_onevision"} <= set(names)
    assert len(names) == len(set(names))


def test_a_distribution_brings_a_strategy_that_yaml_and_schema_know(add: Add, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="unknown strategy 'zebra'"):
        load_pipeline({"stages": [{"strategy": "zebra"}]})
    add("zebra-plugin", STRATEGY.format(name="zebra"))
    assert plugins.offered_strategies()["zebra"].origin == "zebra-plugin"
    path = tmp_path / "p.yaml"
    path.write_text("stages:\n  - strategy: zebra\n    at: 3\n")
    assert type(load_pipeline(path).stages[0]).__qualname__ == "Keep.Config"
    assert pipeline_schema()["$defs"]["zebra"]["description"] == "Keep all."


def test_a_strategy_registered_in_the_process_is_seen(add: Add) -> None:
    assert "plain_keep" not in plugins.strategies()
    register(Plain)
    assert plugins.strategies()["plain_keep"] is Plain
    assert load_pipeline({"stages": [{"strategy": "plain_keep"}]}).stages == [Plain.Config()]


def test_two_distributions_with_one_strategy_name_are_both_named(add: Add) -> None:
    add("zebra-a", STRATEGY.format(name="zebra"))
    add("zebra-b", STRATEGY.format(name="zebra"))
    both = r"two plugins offer a strategy 'zebra': 'zebra-a' and 'zebra-b'"
    with pytest.warns(PluginWarning, match=both):
        assert set(plugins.strategies()) >= OURS
    assert "zebra" not in plugins.strategies()
    with pytest.raises(PipelineError, match=rf"unknown strategy 'zebra', which is left out: {both}"):
        load_pipeline({"stages": [{"strategy": "zebra"}]})


def test_a_plugin_cannot_take_one_of_our_names(add: Add) -> None:
    add("zebra-a", STRATEGY.format(name="fastv"))
    with pytest.warns(PluginWarning, match=r"strategy 'fastv'.*'(tokenreduce|zebra-a)' and '(tokenreduce|zebra-a)'"):
        assert plugins.offered_strategies()["fastv"].origin == "tokenreduce"


@pytest.mark.parametrize(
    "code",
    [
        *(
            "import nothing_of_this_name",
            "1/0",
            "raise SystemExit(0)",
            "raise BaseException('no')",
            "raise GeneratorExit",
        ),
        *("def broken(:\n", "from tokenreduce import nope"),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_named_and_left_out(add: Add, code: str) -> None:
    add("broken-plugin", code)
    add("zebra-plugin", STRATEGY.format(name="zebra"))
    with pytest.warns(PluginWarning) as caught:
        found = plugins.strategies()
    assert set(found) >= {*OURS, "zebra"}
    assert len(caught) == 1
    assert "plugin 'broken-plugin' cannot be imported" in str(caught[0].message)
    assert re.search("Error|Exit|BaseException: no", str(caught[0].message))
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plugins.strategies()


def test_a_hook_that_raises_is_named_and_left_out(add: Add) -> None:
    code = "@hookimpl\ndef tokenreduce_strategies():\n    import nothing_here\n"
    add("late-plugin", f"from tokenreduce.hookspecs import hookimpl\n{code}")
    with pytest.warns(
        PluginWarning, match=r"plugin 'late-plugin' fails in tokenreduce_strategies: ModuleNotFoundError"
    ):
        assert set(plugins.strategies()) >= OURS


@pytest.mark.parametrize(
    ("value", "zebra", "lion"),
    [
        ("1", False, False),
        ("all", False, False),
        ("zebra-plugin", False, True),
        ("Zebra_Plugin, other", False, True),
        ("lion", True, False),
        ("zebra-plugin,lion-plugin", False, False),
        ("0", True, True),
        ("", True, True),
    ],
)
def test_third_parties_can_be_turned_off(
    add: Add, monkeypatch: pytest.MonkeyPatch, value: str, zebra: bool, lion: bool
) -> None:
    add("zebra-plugin", STRATEGY.format(name="zebra"))
    add("lion-plugin", STRATEGY.format(name="lion"), entry="lion")
    monkeypatch.setenv(DISABLE, value)
    found = plugins.strategies()
    assert (("zebra" in found), ("lion" in found)) == (zebra, lion)
    assert set(found) >= OURS


def without(attribute: str) -> type:
    members = {name: value for name, value in vars(Plain).items() if not name.startswith(("__", "_abc"))}
    del members[attribute]
    return type("Broken", (Strategy,), members)


def changed(**members: Any) -> type:
    return type("Broken", (Plain,), members)


class OtherName(StageConfig):
    strategy: Literal["other"] = "other"


class Loose(StageConfig, extra="ignore"):
    strategy: Literal["plain_keep"] = "plain_keep"


class Called(StageConfig):
    strategy: Literal["plain_keep"] = "plain_keep"
    rank: Callable[[int], int] = len


class Endless(StageConfig):
    strategy: Literal["plain_keep"] = "plain_keep"
    most: float = float("inf")


class Opaque(StageConfig):
    strategy: Literal["plain_keep"] = "plain_keep"
    names: Any = object()


class Hostile(type(Strategy)):  # type: ignore[misc]
    """Of classes that cannot even be looked at."""

    def __subclasscheck__(cls, other: type) -> bool:
        raise SystemExit(0)

    @property
    def __name__(cls) -> str:
        raise ValueError

    def __repr__(cls) -> str:
        raise ValueError


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (changed(Config=Called), "Broken.Config has no JSON Schema (PydanticInvalidForJsonSchema"),
        (changed(Config=Endless), "Broken.Config has no JSON Schema (ValueError"),
        (changed(Config=Opaque), "Broken.Config.names: its default <object object"),
        pytest.param(Hostile("Hostile", (), {}), "a Hostile cannot be checked: ValueError", id="hostile"),
        (3, "3 is not a subclass of tokenreduce.strategy.Strategy"),
        (dict, "dict is not a subclass"),
        (without("name"), "Broken.name must be lower case letters, digits and _, got None"),
        (changed(name="Bad Name"), "Broken.name must be lower case letters, digits and _, got 'Bad Name'"),
        (without("Config"), "Broken.Config must be a subclass of tokenreduce.strategy.StageConfig"),
        (changed(Config=dict), "Broken.Config must be a subclass"),
        (changed(Config=StageConfig), "Broken.Config must be a subclass"),
        (changed(Config=OtherName), "Broken.Config needs the field `strategy: Literal['plain_keep'] = 'plain_keep'`"),
        (changed(Config=Loose), "Broken.Config must forbid unknown fields"),
        (without("capabilities"), "Broken.capabilities must be a Capabilities"),
        (changed(capabilities=Capabilities(sites=())), "Broken.capabilities must be a Capabilities"),
        (without("decide"), "Broken does not define decide"),
    ],
)
def test_a_strategy_that_breaks_the_contract_is_named_and_left_out(add: Add, broken: Any, message: str) -> None:
    register(broken)
    with pytest.warns(PluginWarning) as caught:
        assert set(plugins.strategies()) >= OURS
    assert len(caught) == 1
    assert f"plugin 'in-process': {message}" in str(caught[0].message)
    assert f"{DISABLE}=in-process" in str(caught[0].message)
    assert pipeline_schema()["$defs"].keys() >= OURS


@pytest.mark.parametrize(
    ("hook", "result", "message"),
    [
        ("tokenreduce_strategies", {"a": 1}, "must return a list from tokenreduce_strategies, got dict"),
        ("tokenreduce_presets", ["a"], "must return a dict from tokenreduce_presets, got list"),
        ("tokenreduce_presets", {"a": 3}, "tokenreduce_presets must map names to paths, got 'a': 3"),
        ("tokenreduce_adapters", [Plain], "Plain is not a subclass of tokenreduce.adapter.ModelAdapter"),
        ("tokenreduce_adapters", [ModelAdapter], "ModelAdapter.name must be lower case"),
    ],
)
def test_hooks_must_return_what_they_say(add: Add, hook: str, result: Any, message: str) -> None:
    register(hook=hook, result=result)
    with pytest.warns(PluginWarning, match=message):
        plugins.strategies() if "strat" in hook else plugins.presets() if "presets" in hook else plugins.adapters()
    assert set(plugins.strategies()) >= OURS
    assert "framefusion" in plugins.presets()
    assert "qwen2_vl" in plugins.offered_adapters()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def tokenreduce_strategy():\n    return []\n", "unknown hook 'tokenreduce_strategy'"),
        ("def tokenreduce_observe(stage):\n    pass\n", "stage"),
    ],
)
def test_a_hook_that_does_not_fit_is_left_out(add: Add, code: str, message: str) -> None:
    add("typo-plugin", f"from tokenreduce.hookspecs import hookimpl\n@hookimpl\n{code}")
    with pytest.warns(PluginWarning, match=rf"plugin 'typo-plugin' has hooks that do not fit: .*{message}"):
        assert set(plugins.strategies()) >= OURS


def test_presets_and_adapters_of_plugins(add: Add, tmp_path: Path) -> None:
    class Zebra(ModelAdapter):
        name = "zebra"

    preset = tmp_path / "theirs.yaml"
    preset.write_text("name: theirs\nstages: []\n")
    register(Zebra, hook="tokenreduce_adapters")
    assert plugins.adapters()[0] is Zebra, "a third party's adapter comes before ours"
    plugins.manager.cache_clear()
    register(hook="tokenreduce_presets", result={"theirs": str(preset)})
    assert load_pipeline("theirs").name == "theirs"
    assert plugins.offered_presets()["theirs"].origin == "in-process"


def test_a_preset_name_of_ours_cannot_be_taken(add: Add, tmp_path: Path) -> None:
    register(hook="tokenreduce_presets", result={"framefusion": tmp_path / "x.yaml"})
    with pytest.warns(PluginWarning, match=r"two plugins offer a preset 'framefusion': .*'in-process'"):
        assert plugins.offered_presets()["framefusion"].origin == "tokenreduce"


def test_a_source_tree_that_is_not_installed_finds_our_adapters() -> None:
    code = (
        "import importlib.metadata as m; m.entry_points = lambda **k: ();"
        "from tokenreduce import plugins;"
        "print(sorted(plugins.strategies())); print([a.name for a in plugins.adapters()])"
    )
    path = f"{ROOT}:{ROOT / 'adapters'}"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}, cwd="/"
    )
    assert "fastv" in run.stdout
    assert "qwen2_vl" in run.stdout


def test_a_blank_docstring_is_no_error(add: Add) -> None:
    for number, text in enumerate(("", "   ", "\n\n", None, 5)):
        name = f"blank{number}"
        config = type("Config", (StageConfig,), {"__annotations__": {"strategy": Literal[name]}, "strategy": name})  # type: ignore[valid-type]
        register_as(f"blank-{number}", changed(name=name, Config=config, __doc__=text))
    schema = pipeline_schema()["$defs"]
    assert [schema[f"blank{number}"]["description"] for number in range(5)] == [f"blank{number}" for number in range(5)]


def register_as(origin: str, *offered: Any) -> None:
    module = ModuleType("in_process")
    module.tokenreduce_strategies = hookimpl(specname="tokenreduce_strategies")(lambda: list(offered))  # type: ignore[attr-defined]
    plugins.manager().register(module, origin)


def test_an_adapter_that_fails_does_not_take_the_others_down(add: Add) -> None:
    class Init(ModelAdapter):
        name = "fails_to_begin"

        def __init__(self) -> None:
            raise SystemExit(0)

    class Match(ModelAdapter):
        name = "fails_to_match"

        def matches(self, model: Any) -> bool:
            raise ValueError("no\nmatch")

    register(Init, Match, hook="tokenreduce_adapters")
    model = tiny_model()
    with pytest.warns(PluginWarning) as caught:
        adapter = plugins.adapter_of(model)
    assert adapter is not None
    assert adapter.name not in ("fails_to_begin", "fails_to_match")
    assert [str(warning.message).partition(";")[0] for warning in caught] == [
        "plugin 'in-process' adapter fails_to_begin fails: SystemExit: 0",
        "plugin 'in-process' adapter fails_to_match fails: ValueError: no match",
    ]
    assert plugins.adapter_of(model) is not None, "and it is warned of once"


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ZeroDivisionError("no"), "failed: ZeroDivisionError: no"),
        (SystemExit(0), "failed: SystemExit: 0"),
        ([1], "returned a list, not a TokenLayout"),
    ],
)
def test_an_adapter_in_use_that_fails_is_named(add: Add, answer: Any, message: str) -> None:
    class Mine(ModelAdapter):
        name = "mine"

        def matches(self, model: Any) -> bool:
            return True

        def layout(self, model: Any, prompt: Any) -> Any:
            if isinstance(answer, BaseException):
                raise answer
            return answer

    register(Mine, hook="tokenreduce_adapters")
    model = tiny_model()
    with (
        pytest.raises(PluginError, match=rf"plugin 'in-process': adapter mine: layout\(\) {message}"),
        tr.reduce(model, "fastv", budget=0.8),
    ):
        logits(model)


def test_a_strategy_that_exits_is_an_error(add: Add) -> None:
    class Leaves(Plain):
        def decide(self, ctx: StageContext) -> Decision | None:
            raise SystemExit(0)

    register(Leaves)
    model = tiny_model()
    with (
        pytest.raises(PluginError, match=r"strategy plain_keep at .* failed: SystemExit: 0"),
        tr.reduce(model, {"stages": [{"strategy": "plain_keep"}]}, layout=layout()),
    ):
        logits(model)


def test_what_a_plugin_prints_is_not_on_stdout(add: Add, capsys: pytest.CaptureFixture[str]) -> None:
    code = STRATEGY.format(name="zebra").replace("    return [Keep]", "    print('hooked')\n    return [Keep]")
    add("loud-plugin", f"print('hello')\n{code}")
    assert "zebra" in plugins.strategies()
    assert capsys.readouterr() == ("", "hello\nhooked\n")
