"""What is written down says its version; older things are read as they were meant, newer ones refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tokenreduce.compare.store import Store
from tokenreduce.config.versions import FOLDER, PIPELINE
from tokenreduce.errors import PipelineError, TokenReduceError
from tokenreduce.pipeline import load_pipeline, pipeline_problems, pipeline_schema

STAGES = [{"strategy": "fastv"}]


def test_a_pipeline_without_a_version_is_of_this_one() -> None:
    plain = load_pipeline({"name": "x", "stages": STAGES})
    said = load_pipeline({"name": "x", "version": PIPELINE, "stages": STAGES})
    assert plain == said
    assert "version" not in said.to_yaml()
    assert pipeline_schema()["properties"]["version"]["maximum"] == PIPELINE


def test_a_newer_pipeline_is_refused_before_its_unknown_fields(tmp_path: Path) -> None:
    file = tmp_path / "new.yaml"
    file.write_text(f"name: x\nversion: {PIPELINE + 1}\nnovelty: 3\nstages:\n  - strategy: not_yet_here\n")
    (line,) = pipeline_problems(file)
    assert line.startswith(f"{file}:2:10: version: of version {PIPELINE + 1}, which a newer tokenreduce wrote; ")
    assert line.endswith("install a newer one")


@pytest.mark.parametrize("version", [0, -1, True, "1", 1.5, None])
def test_an_impossible_version_is_refused(version: Any) -> None:
    with pytest.raises(PipelineError, match="version"):
        load_pipeline({"name": "x", "version": version, "stages": STAGES})


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "version": FOLDER,
        "arms": [{"name": "dense", "model": "m", "method": "dense", "pipeline": None}],
        **changes,
    }


def test_a_folder_of_a_newer_tokenreduce_is_refused_for_going_on_and_for_reports(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(settings(version=FOLDER + 1)))
    (tmp_path / "results.jsonl").write_text("{}\n")
    for act in (lambda: Store.read(tmp_path), lambda: Store.create_or_resume(tmp_path, settings())):
        with pytest.raises(TokenReduceError, match=r"which a newer tokenreduce wrote.*install a newer one"):
            act()


def test_a_folder_from_before_versions_is_not_gone_on_with(tmp_path: Path) -> None:
    old = settings()
    del old["version"]
    (tmp_path / "settings.json").write_text(json.dumps(old))
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(TokenReduceError, match=r"of an older tokenreduce; --report-only reports it"):
        Store.create_or_resume(tmp_path, settings())
    assert json.loads((tmp_path / "settings.json").read_text()) == old
