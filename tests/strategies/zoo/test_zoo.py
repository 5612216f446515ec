"""Every strategy against recorded cases of its public implementation (tests/data/zoo), in the real engine.

The recordings hold tensors that public functions returned on small synthetic inputs; see replay.py for what the verdicts mean.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from strategies.zoo.replay import Trial, compare, main, run, together
from strategies.zoo.table import TABLE, TEXT, Tower, stage, video

DATA = Path(__file__).parents[2] / "data" / "zoo"
CASES = [
    pytest.param(index.parent.name, number, id=f"{index.parent.name}-{case['file'][5:7]}")
    for index in sorted(DATA.glob("*/cases.json"))
    for number, case in enumerate(json.loads(index.read_text())["cases"])
]
DEFECTS = {"llava_scissor-08", "prumerge-04", "vispruner-10"}
"""Cases in which no way of ours to run them is equal, because the public code's result has a named defect."""


@pytest.mark.parametrize(("method", "number"), CASES)
def test_a_recorded_case_is_reproduced(method: str, number: int, request: pytest.FixtureRequest) -> None:
    case = json.loads((DATA / method / "cases.json").read_text())["cases"][number]
    tensors = load_file(DATA / method / case["file"])
    trials = TABLE[method](case["params"], tensors, case)
    verdict, clause = together([(label, *compare(trial, case)) for label, trial in trials])
    if verdict == "not applicable":
        pytest.skip(clause)
    tie = case["comparison"].startswith("ties")
    expected = ("defect",) if request.node.callspec.id in DEFECTS else ("equal", "tie") if tie else ("equal",)
    assert verdict in expected, clause


def test_the_command_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A recording with one kept token changed is not equal, and the exit status says so."""
    from safetensors.torch import save_file

    folder = tmp_path / "divprune"
    folder.mkdir()
    index = json.loads((DATA / "divprune" / "cases.json").read_text())
    index["cases"] = index["cases"][:1]
    tensors = load_file(DATA / "divprune" / index["cases"][0]["file"])
    (folder / "cases.json").write_text(json.dumps(index))
    save_file(tensors, folder / index["cases"][0]["file"])
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["divprune/case_00: equal: divprune: 10 tokens", "1 equal"]
    wrong = tensors["out.kept"].clone()
    wrong[0] = next(place for place in range(100) if place not in wrong.tolist())
    save_file({**tensors, "out.kept": wrong}, folder / index["cases"][0]["file"])
    assert main([str(tmp_path)]) == 1
    assert (
        "divprune/case_00: differs: divprune: 10 tokens, recorded 10; 2 are in one set only" in capsys.readouterr().out
    )
    assert main([str(tmp_path / "nothing")]) == 2


def test_fastervlm_keeps_the_most_attended_of_each_frame() -> None:
    """No recording of it: against the card, the top of the class token's attention, mean over heads, as many in every frame."""
    generator = torch.Generator().manual_seed(0)
    features, attention = torch.randn(30, 8, generator=generator), torch.rand(2, 30, generator=generator)
    made = video(features, 3, stages=stage("fastervlm", keep=12, rows="cls"), signals={"tower": Tower(attention)})
    mean = attention.mean(0).view(3, 10)
    wanted = [10 * f + s for f in range(3) for s in sorted(range(10), key=lambda s, f=f: -float(mean[f, s]))[:4]]
    assert run(Trial(**made)).kept.tolist() == sorted(TEXT + place for place in wanted)
