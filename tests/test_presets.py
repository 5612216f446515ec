"""The presets that ship with tokenreduce, and the pipelines in the documentation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tokenreduce import plugins
from tokenreduce.budget import Budget
from tokenreduce.pipeline import Pipeline, build, load_pipeline, pipeline_problems, pipeline_schema

DOCUMENT = Path(__file__).parents[1] / "docs" / "pipelines.md"
PRESETS = [
    "framefusion",
    "framefusion_official",
    "fastv",
    "streaming_llm",
    "random",
    "uniform_frames",
    "merge_only",
    "prune_only",
    "prune_then_merge",
    "noncascaded_merge",
]


def test_the_presets_of_the_published_methods_are_there() -> None:
    assert set(PRESETS) <= set(plugins.presets())


@pytest.mark.parametrize("name", sorted({*PRESETS, *plugins.presets()}))
def test_every_preset_is_valid_described_and_round_trips(name: str, tmp_path: Path) -> None:
    pipeline = load_pipeline(name)
    assert pipeline.name == name
    assert pipeline.description
    assert len(build(pipeline)) == len(pipeline.stages)
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
    for name in [*Pipeline.model_fields, *Budget.model_fields, *PRESETS]:
        assert f"`{name}" in text or f"{{{name}" in text or f" {name}: " in text, name
