"""Plugins that misbehave at any place in any way: whatever one does, the rest works, and one warning names it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WAYS = {
    "error": "raise ValueError('no\\nway \\x1b[31m')",
    "exit": "raise SystemExit(0)",
    "base": "raise BaseException('no')",
    "generator exit": "raise GeneratorExit",
    "recursion": "f = lambda: f(); f()",
    "memory": "raise MemoryError",
    "group": "raise ExceptionGroup('many', [ValueError('a'), TypeError('b')])",
    "mute": "raise type('Mute', (Exception,), {'__str__': lambda self: 1 / 0})()",
    "loud": "print('{'); raise OSError(28, 'full')",
}
"""What is done."""
HEAD = """
from typing import Any, Callable, Literal
from pydantic import field_validator
from tokenreduce.adapter import ModelAdapter
from tokenreduce.hookspecs import hookimpl
from tokenreduce.strategy import Capabilities, StageConfig, Strategy
def act():
    {way}
"""
STRATEGY = """
class Bad(Strategy):
    name = "bad"
    capabilities = Capabilities(sites=("pre_attention",))
    class Config(StageConfig):
        strategy: Literal["bad"] = "bad"
        {field}
    {member}
    def decide(self, ctx): return None
@hookimpl
def tokenreduce_strategies(): return [Bad]
"""
ADAPTER = """
class Bad(ModelAdapter):
    name = "bad"
    {member}
@hookimpl
def tokenreduce_adapters(): return [Bad]
"""
PLACES = {
    "import": "act()",
    "strategies hook": "@hookimpl\ndef tokenreduce_strategies(): act()",
    "adapters hook": "@hookimpl\ndef tokenreduce_adapters(): act()",
    "presets hook": "@hookimpl\ndef tokenreduce_presets(): act()",
    "a lazy list": "class L(list):\n    def __iter__(self): act()\n@hookimpl\ndef tokenreduce_strategies(): return L([1])",
    "a name that fails": STRATEGY.format(
        field="", member="capabilities = property(lambda self: act())\n    class Meta(type): pass"
    ),
    "an adapter's constructor": ADAPTER.format(member="def __init__(self): act()"),
    "an adapter's matches": ADAPTER.format(member="def matches(self, model): act()"),
    "an adapter's matches at bool": ADAPTER.format(
        member="def matches(self, model): return type('B', (), {'__bool__': lambda self: act()})()"
    ),
}
"""Where it is done."""
SHAPES = {
    "a blank docstring": STRATEGY.format(field="", member="__doc__ = '  '"),
    "a callable field": STRATEGY.format(field="rank: Callable[[int], int] = len", member=""),
    "a default beyond JSON": STRATEGY.format(field="most: float = float('inf')", member=""),
    "a default that is an object": STRATEGY.format(field="thing: Any = object()", member=""),
    "a default that is a set of bytes": STRATEGY.format(field="thing: Any = {b'\\xff'}", member=""),
    "our name": STRATEGY.format(field="", member="").replace("bad", "fastv"),
    "another signature": "@hookimpl\ndef tokenreduce_observe(stage): pass",
    "no such hook": "@hookimpl\ndef tokenreduce_strategy(): return []",
    "a dict for a list": "@hookimpl\ndef tokenreduce_strategies(): return {'a': 1}",
    "None": "@hookimpl\ndef tokenreduce_presets(): return None",
    "a preset at a number": "@hookimpl\ndef tokenreduce_presets(): return {'a': 3, 4: 'b', '': 'c'}",
    "a class that is none": "@hookimpl\ndef tokenreduce_adapters(): return [3, dict, ModelAdapter]",
    "notes of another kind": ADAPTER.format(member="notes = 5"),
    "a generator": "@hookimpl\ndef tokenreduce_strategies():\n    yield 1",
}
"""What is offered."""
CASES = {f"{way} in {place}": (way, place) for way, place in itertools.product(WAYS, PLACES)} | {
    shape: ("", shape) for shape in SHAPES
}
QUICK = [
    *(*SHAPES, "exit in import", "base in presets hook", "exit in an adapter's matches", "loud in import"),
    "mute in strategies hook",
]
DRIVER = """
import contextlib, io, json, sys, warnings
import pathlib
from tokenreduce.cli import main
from tokenreduce import plugins
from transformers import Qwen2Config, Qwen2ForCausalLM

COMMANDS = (
    ["strategies", "--json"], ["models", "--json"], ["schema"], ["plan", "fastv", "--json"], ["validate", "framefusion"]
)
SMALL = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2)
model = Qwen2ForCausalLM(Qwen2Config(vocab_size=20, **SMALL))
for case in json.load(sys.stdin):
    folder = pathlib.Path(case["folder"])
    sys.path.insert(0, str(folder))
    plugins.manager.cache_clear()
    sys.modules.pop("bad_plugin", None)
    results = []
    for command in COMMANDS:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(command)
            except BaseException as error:
                code = f"{type(error).__name__}"
        results.append([code, out.getvalue(), err.getvalue()])
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                adapter = plugins.adapter_of(model)
            matched = None if adapter is None else adapter.name
        except BaseException as error:
            matched = type(error).__name__
    print(json.dumps({"case": case["name"], "results": results, "matched": matched}))
    sys.path.remove(str(folder))
"""


def write_plugin(folder: Path, way: str, place: str) -> None:
    body = SHAPES[place] if not way else PLACES[place]
    folder.mkdir()
    (folder / "bad_plugin.py").write_text(HEAD.format(way=WAYS.get(way, "pass")) + "\n" + body + "\n")
    info = folder / "bad_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[tokenreduce]\nbad = bad_plugin\n")


def check(done: dict[str, object]) -> int:
    """Hold what one plugin led to to the contract; returns the warnings that name it."""
    results: list[tuple[object, str, str]] = done["results"]  # type: ignore[assignment]
    case, warned = done["case"], 0
    for number, (code, out, err) in enumerate(results):
        assert code == 0, (case, number, code, err[-300:])
        if number < 4:
            json.loads(out)
        assert "Traceback" not in err, (case, err)
        assert "\x1b" not in err, (case, err)
        warned += sum(line.startswith("warning: ") and "bad-plugin" in line for line in err.splitlines())
    assert "fastv" in {entry["name"] for entry in json.loads(results[0][1])}, case
    assert done["matched"] == "decoder" or done["matched"] not in (
        "bad",
        "ValueError",
        "SystemExit",
        "BaseException",
    ), case
    return warned


SLOW = {way: [name for name, case in CASES.items() if case[0] == way] for way in WAYS}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(QUICK, id="quick"),
        *(pytest.param(names, id=way, marks=pytest.mark.slow) for way, names in SLOW.items()),
    ],
)
def test_the_rest_works(names: list[str], tmp_path: Path, record_property: pytest.RecordProperty) -> None:
    cases = []
    for number, name in enumerate(names):
        write_plugin(tmp_path / str(number), *CASES[name])
        cases.append({"name": name, "folder": str(tmp_path / str(number))})
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'adapters'}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment,
        timeout=540,
    )
    done = [json.loads(line) for line in run.stdout.splitlines() if line.startswith('{"case"')]
    assert len(done) == len(names), run.stderr[-2000:]
    for each in done:
        warned = check(each)
        silent = each["case"] in ("a blank docstring",) or "matches" in each["case"] or "constructor" in each["case"]
        assert silent or warned >= 1, each["case"]
    record_property("attacks", f"{len(names)} plugins tried, 5 commands and a match each")
