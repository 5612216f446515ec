"""The released FrameFusion on MiniCPM-V 2.6: our engine, adapter and native model against a run of the official code."""

from __future__ import annotations

import pytest
import torch
from support.minicpm_v_golden import error, golden, golden_inputs, greedy, load, table, upstream_folder
from tokenreduce_adapters.minicpm_v import MiniCPMVAdapter

from tokenreduce.engine.attach import Run
from tokenreduce.models.minicpm_v.modeling import MiniCPMVForConditionalGeneration
from tokenreduce.pipeline import load_pipeline
from tokenreduce.planning import schedule
from tokenreduce.planning.account import released_removal

RUNS = table("framefusion_run")["runs"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MiniCPMVForConditionalGeneration:
    return load(upstream_folder(tmp_path_factory.mktemp("minicpm") / "tiny"))


def run_on(model: MiniCPMVForConditionalGeneration, threshold: float, cost: float) -> Run:
    """The official preset with another threshold and budget, by the adapter of this family."""
    official = load_pipeline("framefusion_official").model_dump(by_alias=True, exclude_none=True)
    official["budget"]["tokens"] = cost
    official["stages"][0]["threshold"] = threshold
    return Run(model, load_pipeline(official), adapter=MiniCPMVAdapter())


@pytest.mark.parametrize("name", RUNS)
def test_official_run(model: MiniCPMVForConditionalGeneration, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "released_removal", lambda shares, cost, layers: released_removal(shares, cost, 28))
    expected, case = RUNS[name], name.split(".")[0]
    inputs, run = golden_inputs(case), golden("framefusion_run")
    with torch.no_grad(), run_on(model, expected["similarity_lower_bound"], expected["cost"]) as reduced:
        logits = model(**inputs).logits[0, -1]
        held = [int(layer.tokens[0]) for layer in reduced.trace.layers]
        answer = greedy(model, inputs)[0]
    # The official lengths are those after a layer, ours those its attention held: the same, one layer later.
    after = [length for _, length in expected["len_after_layer"]]
    assert held[1:] == after[:-1]
    assert error(logits, run[f"{name}.last_logits"]) <= 2e-5
    assert answer.tolist() == run[f"{name}.greedy"].tolist()


def test_a_pipeline_that_keeps_all_changes_no_bit(model: MiniCPMVForConditionalGeneration) -> None:
    inputs = golden_inputs("video_sliced")
    with torch.no_grad():
        before = model(**inputs).logits
        with run_on(model, 0.7, 0.5):
            assert not torch.equal(model(**inputs).logits[:, -1], before[:, -1])
        keep = load_pipeline({"name": "keep", "budget": {"tokens": 1.0}, "stages": [{"strategy": "importance_prune"}]})
        with Run(model, keep, adapter=MiniCPMVAdapter()) as run:
            assert torch.equal(model(**inputs).logits, before)
            assert {int(layer.tokens[0]) for layer in run.trace.layers} == {672}
        assert torch.equal(model(**inputs).logits, before)
