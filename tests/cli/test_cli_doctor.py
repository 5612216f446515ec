"""`tokenreduce doctor`: what it says is so."""

from __future__ import annotations

import json
import platform
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tokenreduce
from tokenreduce import plugins
from tokenreduce.cli import doctor, main
from tokenreduce.hookspecs import hookimpl

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def guest() -> Iterator[ModuleType]:
    """A plugin that offers a preset which exists and a strategy which is none."""
    module = ModuleType("guest")

    @hookimpl
    def tokenreduce_strategies() -> list[type]:
        return [str]

    @hookimpl
    def tokenreduce_presets() -> dict[str, str]:
        return {"guests_own": str(Path(tokenreduce.__file__).parent / "presets" / "fastv.yaml")}

    vars(module).update(tokenreduce_strategies=tokenreduce_strategies, tokenreduce_presets=tokenreduce_presets)
    plugins.manager().register(module, "guest-package:guest")
    yield module
    plugins.manager.cache_clear()


def test_versions_devices_and_extras_are_those_here(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENREDUCE_DISABLE_PLUGINS", "1")
    plugins.manager.cache_clear()
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    plugins.manager.cache_clear()
    assert text.startswith(f"tokenreduce {tokenreduce.__version__}, Python {platform.python_version()}, ")
    assert f"torch {metadata.version('torch')}, transformers {metadata.version('transformers')}" in text
    assert "device cpu: " in text
    assert torch.accelerator.is_available() or "device accelerator: none: " in text
    assert "plugins: none but our own\n" in text
    assert "TOKENREDUCE_DISABLE_PLUGINS=1\n" in text
    assert str(Path.home()) not in text
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert main(["doctor"]) == 0
    assert "extra ray: not installed; pip install '.[ray]' in a checkout\n" in capsys.readouterr().out


def test_it_names_plugins_and_why_one_of_their_things_is_left_out(capsys: Captured, guest: ModuleType) -> None:
    assert main(["doctor", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    (plugin,) = (each for each in found["plugins"] if each["origin"] == "guest-package")
    assert plugin["offers"] == "presets guests_own"
    assert any("guest-package" in why and "str" in why for why in found["left_out"].values())
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "plugin guest-package" in text
    assert "left out " in text


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name != "dev"}
    assert extras.keys() == doctor.EXTRAS.keys()
    for name, package in doctor.EXTRAS.items():
        assert extras[name][0].startswith(package)
