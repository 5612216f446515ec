"""Which strategies a family can run, from its config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.double import Double, plugin  # noqa: F401

from tokenreduce.cli import main
from tokenreduce.errors import UnsupportedError
from tokenreduce.models.abilities import abilities
from tokenreduce.strategy import Capabilities


def needing(monkeypatch: pytest.MonkeyPatch, *needs: Any) -> None:
    monkeypatch.setattr(Double, "capabilities", Capabilities(sites=("pre_attention",), needs=needs))


@pytest.mark.parametrize(
    ("need", "model", "why"),
    [
        ("tower.cls", "llava-hf/llava-1.5-7b-hf", ""),
        ("tower.pooled", "llava", ""),
        ("tower.cls", "llava_onevision", "no class token"),
        ("tower.mean", "qwen2", "does not say how"),
        ("grid", "minicpm_v", "are in no grid"),
        ("grid", "internvl", ""),
    ],
)
def test_why_not(need: str, model: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needing(monkeypatch, need)
    found = abilities(model)
    assert found["fastv"] == ""
    assert why in found["double"]
    assert bool(found["double"]) == bool(why)


def test_of_a_config_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This one's tower pools, which by default SigLIP in LLaVA-OneVision does not."""
    from support.families import onevision_config

    config = onevision_config()
    needing(monkeypatch, "tower.pooled")
    for head, why in ((False, "no pooled output"), (True, "")):
        config.vision_config.vision_use_head = head
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        assert why in abilities(str(tmp_path))["double"]
        assert bool(abilities(str(tmp_path / "config.json"))["double"]) == bool(why)


def test_a_name_that_is_none() -> None:
    with pytest.raises(
        UnsupportedError, match="no model family or checkpoint is called internvll; did you mean 'internvl'"
    ):
        abilities("internvll")


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    needing(monkeypatch, "tower.cls")
    assert main(["strategies", "--model", "llava_onevision", "--json"]) == 0
    runs = {entry["name"]: (entry["runs"], entry["why_not"]) for entry in json.loads(capsys.readouterr().out)}
    assert runs["fastv"] == (True, "")
    assert runs["double"][0] is False
    assert "no class token" in runs["double"][1]
