"""Pipelines in YAML and Python: strictness, error positions, round trips, JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tokenreduce import plugins
from tokenreduce.budget import Budget
from tokenreduce.config.yaml_source import write_yaml
from tokenreduce.errors import PipelineError
from tokenreduce.pipeline import Pipeline, build, load_pipeline, pipeline_problems, pipeline_schema
from tokenreduce.strategies.prune.fastv import FastV

VALID: dict[str, dict[str, Any]] = {
    "empty": {"name": "empty", "stages": []},
    "unnamed": {"stages": []},
    "share": {"name": "share", "budget": 0.3, "stages": [{"strategy": "importance_prune"}]},
    "units": {"name": "units", "budget": {"kv_cache": "512MiB"}, "stages": [{"strategy": "streaming_window"}]},
    "vision": {"name": "v", "budget": {"tokens": 0.5, "of": "vision"}, "stages": [{"strategy": "fastv", "at": [2, 8]}]},
    "range": {
        "name": "merge 0.6, then prune",
        "description": "no: really",
        "source": "§4.1",
        "budget": 1,
        "newlines": "protect",
        "stages": [
            {"strategy": "similarity_merge", "threshold": 1e-05, "from": 1, "until": 5},
            {"strategy": "importance_prune", "at": "next", "importance": "last"},
        ],
    },
}


def problems(tmp_path: Path, text: str) -> list[str]:
    """Problems of a file, its folder cut off."""
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    return [line.replace(f"{tmp_path}/", "") for line in pipeline_problems(path)]


STAGES = "name: x\nstages:\n  - strategy: fastv\n    keep: 0.5\n  - strategy: similarity_merge\n    "


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (STAGES + "threshold: high\n", "bad.yaml:6:16: stages[1].threshold: expected a number, got 'high'"),
        (STAGES + "threshold: '0.6'\n", "bad.yaml:6:16: stages[1].threshold: expected a number, got '0.6'"),
        (STAGES + "threshold: true\n", "bad.yaml:6:16: stages[1].threshold: expected a number, got True"),
        (STAGES + "threshold: .nan\n", "bad.yaml:6:16: stages[1].threshold: expected a finite number, got nan"),
        (STAGES + "stop_below: -.inf\n", "bad.yaml:6:17: stages[1].stop_below: expected a finite number, got -inf"),
        (STAGES + "threshold: 1.5\n", "bad.yaml:6:16: stages[1].threshold: expected a number of at most 1.0, got 1.5"),
        (
            STAGES + "from: 1.5\n",
            "bad.yaml:6:11: stages[1].from: expected a whole number or a number below 1.0, got 1.5",
        ),
        (STAGES + "from: true\n", "bad.yaml:6:11: stages[1].from: expected a whole number or a number, got True"),
        (
            STAGES + "tresholds: 0.6\n",
            "bad.yaml:6:5: stages[1].tresholds: unknown field; did you mean 'threshold'? (known: at, from, ",
        ),
        (
            STAGES + "weighting: sise\n",
            "bad.yaml:6:16: stages[1].weighting: expected 'size', 'plain' or 'keep_first', got 'sise'; did you mean 'size'?",
        ),
        (
            STAGES + "at: nxt\n",
            "bad.yaml:6:9: stages[1].at: expected a whole number or a number or a list or 'next', got 'nxt'",
        ),
        (
            STAGES + "at: [2, -1]\n",
            "bad.yaml:6:13: stages[1].at[1]: expected a number of at least 0 or a number above 0.0, got -1",
        ),
        (STAGES + "at: [2, 1]\n", "bad.yaml:5:5: stages[1]: `at` must be a list of layers in growing order"),
        (STAGES + "from: 3\n    until: 1\n", "bad.yaml:5:5: stages[1]: `until: 1` comes before `from: 3`"),
        (
            "stages:\n  - strategy: fastvv\n",
            "bad.yaml:2:15: stages[0].strategy: unknown strategy 'fastvv'; did you mean 'fastv'? (known: aim, ",
        ),
        ("stages:\n  - at: 2\n", "bad.yaml:2:5: stages[0]: the field 'strategy' is missing; it names one of aim,"),
        ("stages:\n  - strategy: [fastv]\n", "bad.yaml:2:15: stages[0].strategy: unknown strategy ['fastv']"),
        ("stages:\n  - fastv\n", "bad.yaml:2:5: stages[0]: expected a mapping with `strategy`, got 'fastv'"),
        (
            "stages:\n  - strategy: fastv\n    site: kv\n",
            "bad.yaml:3:11: stages[0].site: fastv cannot act at 'kv'; it can at: pre_attention",
        ),
        ("stages: fastv\n", "bad.yaml:1:9: stages: expected a list, got 'fastv'"),
        ("name: x\n", "bad.yaml:1:1: the field 'stages' is missing"),
        ("stage: []\nstages: []\n", "bad.yaml:1:1: stage: unknown field; did you mean 'stages'? (known: budget,"),
        ("name: 3\nstages: []\n", "bad.yaml:1:7: name: expected text, got 3"),
        ("name: ../../x\nstages: []\n", "bad.yaml:1:7: name: expected text that matches"),
        ("newlines: keep\nstages: []\n", "bad.yaml:1:11: newlines: expected 'merge' or 'protect', got 'keep'"),
        ("- a\n", "bad.yaml:1:1: expected a mapping with `name` and `stages`, got ['a']"),
        ("stages: [\n", "bad.yaml:2:1: not valid YAML"),
        ("stages: []\nstages: []\n", "bad.yaml:2:1: duplicate key 'stages'; first given in line 1"),
    ],
)
def test_errors_say_where_what_and_the_remedy(tmp_path: Path, text: str, line: str) -> None:
    found = problems(tmp_path, text)
    assert len(found) == 1
    assert found[0].startswith(line)


@pytest.mark.parametrize(
    ("budget", "line"),
    [
        ("0", "bad.yaml:1:9: budget: tokens: expected a number above 0, got 0"),
        ("-0.3", "bad.yaml:1:9: budget: tokens: expected a number above 0, got -0.3"),
        ("1.5", "bad.yaml:1:9: budget: 1.5 is above 1"),
        ("true", "bad.yaml:1:9: budget: "),
        (".nan", "bad.yaml:1:9: budget: expected a finite number, got nan"),
        ("[1]", "bad.yaml:1:9: budget: "),
        ("{tokns: 0.3}", "bad.yaml:1:10: budget.tokns: unknown field; did you mean 'tokens'?"),
        (
            "{latency: 0.3}",
            "bad.yaml:1:10: budget.latency: unknown field (known: arithmetic, flops, kv_cache, of, per, tokens)",
        ),
        ("{tokens: true}", "bad.yaml:1:18: budget.tokens: expected a number"),
        ("{tokens: 0.3, flops: 0.3}", "bad.yaml:1:9: budget: a budget has exactly one of tokens, flops, kv_cache"),
        ("{}", "bad.yaml:1:9: budget: a budget has exactly one of tokens, flops, kv_cache"),
        ("{kv_cache: 12 parsec}", "bad.yaml:1:9: budget: kv_cache: cannot read '12 parsec'"),
        ("{tokens: 0.3, of: text}", "bad.yaml:1:27: budget.of: expected 'all' or 'vision', got 'text'"),
    ],
)
def test_budget_errors(tmp_path: Path, budget: str, line: str) -> None:
    found = problems(tmp_path, f"budget: {budget}\nstages: []\n")
    assert found
    assert found[0].startswith(line)


def test_all_problems_are_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "nam: x\nbudget: 7\nstages:\n  - strategy: fastv\n    keep: -1\n  - strategy: nonsense\n"
    found = problems(tmp_path, text)
    assert [line.split(":")[1] for line in found] == ["1", "2", "5", "6"]
    with pytest.raises(PipelineError, match=r"bad.yaml:1:1: nam: .* \(the first of 4 problems\)$"):
        load_pipeline(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("framefusionn", "no preset and no file is called 'framefusionn'"),
        ("missing.yaml", "missing.yaml: no such file"),
        ("a/b", "a/b: no such file"),
        ("name: x\nstages: []", r"no preset and no file is called 'name: x\nstages: []'"),
        (3, "expected a preset name, a YAML path or a mapping, got 3"),
        (None, "expected a preset name, a YAML path or a mapping, got None"),
        ({}, "pipeline: the field 'stages' is missing"),
        (
            {"stages": [{"strategy": "fastv", "keep": object()}]},
            "pipeline: stages[0].keep: expected plain data, got object",
        ),
        ({"stages": [{"strategy": "fastv", 3: 1}]}, "pipeline: stages[0]: a key must be text, got 3"),
        ({"stages": [], "name": 10**5000}, "pipeline: name: expected a number of at most 64 bits"),
        ({"stages": [], "name": "\ud800"}, r"pipeline: name: '\ud800' is not valid Unicode text"),
        ({"stages": [{"strategy": "fastv"}] * 6000}, "values"),
    ],
)
def test_sources_that_are_none(source: Any, message: str) -> None:
    with pytest.raises(PipelineError) as caught:
        load_pipeline(source)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_data_that_contains_itself_is_refused() -> None:
    stages: list[Any] = []
    stages.append(stages)
    with pytest.raises(PipelineError, match="nested deeper"):
        load_pipeline({"stages": stages})


@pytest.mark.parametrize("name", VALID)
def test_round_trip_keeps_meaning(name: str, tmp_path: Path) -> None:
    pipeline = load_pipeline(VALID[name])
    path = tmp_path / "again.yaml"
    path.write_text(pipeline.to_yaml(), encoding="utf-8")
    assert load_pipeline(path) == pipeline
    assert load_pipeline(str(path)).to_yaml() == pipeline.to_yaml()


def test_short_and_long_budgets_mean_the_same() -> None:
    short = load_pipeline({"budget": 0.3, "stages": []})
    assert short.budget == Budget(tokens=0.3)
    assert short == load_pipeline({"budget": {"tokens": 0.3}, "stages": []})


def test_python_objects_are_accepted_where_they_belong() -> None:
    stage = FastV.Config(keep=0.25)
    pipeline = Pipeline(name="x", budget=Budget(flops=0.5), stages=[stage])
    assert load_pipeline(pipeline) is pipeline
    assert load_pipeline({"name": "x", "budget": Budget(flops=0.5), "stages": [stage]}) == pipeline
    with pytest.raises(PipelineError, match=r"description: expected plain data, got Budget"):
        load_pipeline({"stages": [], "description": Budget(tokens=1)})


def test_build_makes_one_strategy_per_stage() -> None:
    built = build(load_pipeline(VALID["range"]))
    assert [strategy.name for strategy in built] == ["similarity_merge", "importance_prune"]
    assert built[0].config.from_ == 1
    assert build(load_pipeline(VALID["empty"])) == []


def test_schema_describes_every_field_and_agrees_with_the_loader() -> None:
    schema = json.loads(json.dumps(pipeline_schema()))
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for data in VALID.values():
        assert validator.is_valid(data), data
    invalid: list[Any] = [
        {},
        {"stages": [{}]},
        {"stages": [{"strategy": "nonsense"}]},
        {"stages": [{"strategy": "fastv", "site": "kv"}]},
        {"stages": [{"strategy": "fastv", "keep": "0.5"}]},
        {"stages": [{"strategy": "fastv", "thresholds": 0.5}]},
        {"stages": [], "budget": 1.5},
        {"stages": [], "budget": {"tokns": 0.5}},
        {"stages": [], "extra": 1},
    ]
    for data in invalid:
        assert not validator.is_valid(data), data
        with pytest.raises(PipelineError):
            load_pipeline(data)
    for owner in (schema, *(schema["$defs"][name] for name in plugins.strategies())):
        for field, described in owner["properties"].items():
            assert field == "strategy" or described.get("description"), (owner["title"], field)


NAMES = ["name", "stages", "budget", "strategy", "at", "keep", "threshold", "site", "from", "until", "tokens", "of"]
VALUES = ["fastv", "similarity_merge", "next", "kv", "vision", "newlines", "merge", "1e999", "512MiB", ""]
words = st.sampled_from(NAMES + VALUES)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5)
trees = st.recursive(leaves, lambda t: st.lists(t, max_size=4) | st.dictionaries(words, t, max_size=5), max_leaves=20)
pipelines = st.fixed_dictionaries(
    {"stages": st.lists(st.fixed_dictionaries({"strategy": words}, optional={"at": trees, "keep": trees}), max_size=3)},
    optional={"name": leaves, "budget": trees, "newlines": leaves},
)


@settings(deadline=5000, max_examples=300)
@given(trees | pipelines | st.dictionaries(words, trees, max_size=5))
def test_any_data_is_a_pipeline_that_round_trips_or_one_line(data: Any) -> None:
    message = None
    try:
        pipeline = load_pipeline(data)
    except PipelineError as error:
        message = str(error)
    if message is None:
        assert load_pipeline(pipeline.model_dump(mode="json", by_alias=True)) == pipeline
    else:
        assert message.isprintable()


@settings(deadline=5000, max_examples=200)
@given(at=st.integers(0, 200), cut=st.integers(0, 8), new=st.text(max_size=8))
def test_a_damaged_file_is_a_pipeline_or_one_line(
    at: int, cut: int, new: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = write_yaml(VALID["range"])
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_text(text[:at] + new + text[at + cut :], encoding="utf-8", errors="replace")
    for line in pipeline_problems(path):
        assert line.startswith(str(path))
        assert line.isprintable()
