"""The presets that ship with tokenreduce, and the pipelines in the documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from jsonschema import Draft202012Validator
from support.decoders import decoder, embeddings, tokens_of

import tokenreduce as tr
from tokenreduce import plugins
from tokenreduce.budget import Budget
from tokenreduce.pipeline import Pipeline, build, build_vision, load_pipeline, pipeline_problems, pipeline_schema

LAYOUT = tr.TokenLayout.video(before=5, frames=8, per_frame=12, after=4)
TOTAL, VISION, DEPTH = LAYOUT.shape[1], 96, 6
DOCUMENT = Path(__file__).parents[2] / "docs" / "pipelines.md"
PRESETS = [
    "framefusion",
    "framefusion_official",
    "framefusion_equal",
    "fastv",
    "streaming_llm",
    "random",
    "uniform_frames",
    "merge_only",
    "prune_only",
    "prune_then_merge",
    "noncascaded_merge",
]
TOWER = ["framefusion_end_to_end"]
"""Presets that need a model with a vision tower; test_vision_stages runs them."""


def test_the_presets_of_the_published_methods_are_there() -> None:
    assert {*PRESETS, *TOWER} <= set(plugins.presets())


@pytest.mark.parametrize("name", sorted({*PRESETS, *plugins.presets()}))
def test_every_preset_is_valid_described_and_round_trips(name: str, tmp_path: Path) -> None:
    pipeline = load_pipeline(name)
    assert pipeline.name == name
    assert pipeline.description
    assert len(build(pipeline)) + len(build_vision(pipeline)) == len(pipeline.stages)
    path = tmp_path / f"{name}.yaml"
    path.write_text(pipeline.to_yaml(), encoding="utf-8")
    assert load_pipeline(path) == pipeline
    Draft202012Validator(pipeline_schema()).validate(
        json.loads(pipeline.model_dump_json(by_alias=True, exclude_none=True))
    )


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL))
def test_pipelines_in_the_documentation_are_valid(block: str, tmp_path: Path) -> None:
    path = tmp_path / "block.yaml"
    path.write_text(block, encoding="utf-8")
    assert pipeline_problems(path) == []


def test_the_documentation_names_every_field_and_preset() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for name in [*Pipeline.model_fields, *Budget.model_fields, *PRESETS, *TOWER]:
        assert f"`{name}" in text or f"{{{name}" in text or f" {name}: " in text, name


@pytest.mark.parametrize("name", sorted(plugins.presets()))
def test_every_number_of_a_preset_says_where_it_is_from(name: str) -> None:
    """A line that sets a number has a comment; the file says which paper it follows, or that it is a control."""
    text = plugins.presets()[name].read_text(encoding="utf-8")
    for line in text.splitlines():
        value, _, comment = line.partition("#")
        if re.search(r":\s*[{\[]?.*?\b\d", value) and not re.match(r"(source|description):", value):
            assert comment.strip(), f"{name}: no source for {line.strip()!r}"
    assert re.search(r"\(\d{4}\)|Control", text)


@pytest.mark.parametrize("kind", ["static", "mixed", "noise"])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs(name: str, kind: str) -> None:
    """On a decoder of six layers, at its own budget or, where that cannot be met so early, at a larger one."""
    pipeline = load_pipeline(name)
    budget = pipeline.budget
    if name in ("fastv", "prune_only", "prune_then_merge"):
        budget = Budget(tokens=0.6)
    model = decoder(DEPTH)
    x = embeddings(LAYOUT, 32, kind)
    with torch.no_grad(), tr.reduce(model, pipeline, layout=LAYOUT, budget=budget) as run:
        out = model.generate(
            inputs_embeds=x, attention_mask=torch.ones(1, TOTAL, dtype=torch.long), max_new_tokens=4, min_new_tokens=4
        )
    assert out.shape == (1, 4)
    trace = run.trace
    assert trace.pipeline == name
    assert sum(tokens_of(trace)[0]) < DEPTH * TOTAL
    stages = {stage.strategy for stage in trace.stages}
    assert stages <= {stage.strategy for stage in pipeline.stages}
    assert budget is not None
    if budget.of == "all":
        assert trace.relative_tokens[0] <= float(budget.amount)
        slack = VISION / 8 if name == "uniform_frames" else 1
        assert trace.relative_tokens[0] > float(budget.amount) - slack / TOTAL


def test_prune_then_merge_and_its_counterpart_leave_the_same_counts() -> None:
    """Table 3: the same two stages in the other order, at the same layers, with the same tokens in every layer."""
    swapped = {
        "name": "merge_then_prune",
        "budget": 0.55,
        "stages": [
            {"strategy": "similarity_merge", "at": 1, "site": "pre_ffn", "keep": 0.5},
            {"strategy": "importance_prune", "at": 2, "importance": "cumulative"},
        ],
    }
    model, traces = decoder(DEPTH), []
    for pipeline in ("prune_then_merge", swapped):
        with torch.no_grad(), tr.reduce(model, pipeline, layout=LAYOUT, budget=0.55) as run:
            model(inputs_embeds=embeddings(LAYOUT, 32, "mixed"))
        traces.append(run.trace)
    first, second = ([layer.tokens.tolist() + layer.ffn_tokens.tolist() for layer in t.layers] for t in traces)
    assert first == second
    assert first[1] == [TOTAL, TOTAL - VISION // 2]
    looks = [[(stage.strategy, stage.layer, stage.after) for stage in t.stages] for t in traces]
    assert [(name, layer) for name, layer, _ in looks[0]] == [("importance_prune", 1), ("similarity_merge", 2)]
    assert [(name, layer) for name, layer, _ in looks[1]] == [("similarity_merge", 1), ("importance_prune", 2)]
    assert [count for _, _, count in looks[0]] == [count for _, _, count in looks[1]]
    assert not torch.equal(traces[0].source, traces[1].source)


def test_presets_hold_the_papers_numbers() -> None:
    merge, prune = load_pipeline("framefusion").stages
    assert (merge.threshold, merge.stop_below, merge.weighting) == (0.6, 0.1, "size")  # type: ignore[attr-defined]
    assert prune.importance == "cumulative"  # type: ignore[attr-defined]
    official = load_pipeline("framefusion_official").stages
    assert (official[0].weighting, official[1].importance) == ("plain", "last")  # type: ignore[attr-defined]
    assert load_pipeline("fastv").stages[0].at == 2
    assert load_pipeline("streaming_llm").stages[0].sinks == 8  # type: ignore[attr-defined]
    for name in sorted({*PRESETS} - {"merge_only"}):
        budget = load_pipeline(name).budget
        assert budget is not None
        assert float(budget.amount) == 0.3
