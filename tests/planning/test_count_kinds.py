"""Where a stage's count comes from, as `plan` says it."""

from __future__ import annotations

import pytest
from support.double import Double, plugin  # noqa: F401

from tokenreduce.cli import main
from tokenreduce.planning.plan import plan
from tokenreduce.strategy import Capabilities, CountView, Outcome


def test_three_kinds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [
        {"strategy": "similarity_merge", "threshold": 0.9, "at": 0},
        {"strategy": "random", "at": 1, "keep": 192},
        {"strategy": "fastv", "at": 2},
    ]
    lines = plan({"budget": 0.2, "stages": stages}, "llava-video-7b").counts
    assert lines[0].startswith("similarity_merge: count depends on the video; assumed here: ")
    assert lines[1:] == ("random: count known from shapes", "fastv: count solved from the budget")
    declared = Capabilities(sites=("pre_attention", "decode"), content_dependent=True)
    monkeypatch.setattr(Double, "capabilities", declared)
    monkeypatch.setattr(Double, "forecast", lambda self, view: said(view))

    def said(view: CountView) -> Outcome:
        return Outcome(view.reducible_count // 2, assumed="half of the tokens are dull")

    double = {"strategy": "double", "at": 3}
    lines = plan({"stages": [double, double | {"site": "decode"}]}, "llava-video-7b").counts
    assert lines[0] == "double: count depends on the video; assumed here: half of the tokens are dull"
    assert lines[1].endswith("(it acts in decoding, which is not in the table)")
    assert main(["plan", "fastv", "--budget", "0.5"]) == 0
    assert "fastv: count solved from the budget" in capsys.readouterr().out
