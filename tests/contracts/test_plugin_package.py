"""The example plugin is a real package: built, installed beside a built wheel of tokenreduce, and used from YAML."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "plugin_package"
SHOWN = ("__init__.py", "keep_largest_norm.py", "observer.py", "presets/keep_largest_norm.yaml")

RUN = """
import json, logging, torch, tokenreduce as tr
from transformers import Qwen2Config, Qwen2ForCausalLM
import tokenreduce_example_plugin

logging.basicConfig(level="INFO", format="%(message)s")
torch.manual_seed(0)
shape = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=50)
model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=4, **shape)).eval()
layout = tr.TokenLayout.video(before=2, frames=3, per_frame=8, after=3)
embeddings = torch.randn(1, 29, 32)
with torch.no_grad():
    norms = model(inputs_embeds=embeddings, output_hidden_states=True).hidden_states[2][0].norm(dim=-1)
    with tr.reduce(model, tr.load_pipeline("PIPELINE"), layout=layout) as run:
        model(inputs_embeds=embeddings)
vision = norms[2:26]
expected = sorted([0, 1, 26, 27, 28] + (2 + vision.topk(6).indices).tolist())
print(json.dumps({
    "kept": run.trace.kept[0].tolist(),
    "expected": expected,
    "tokens": [int(layer.tokens) for layer in run.trace.layers],
    "files": [tr.__file__, tokenreduce_example_plugin.__file__],
}))
"""

PIPELINE = """
name: mine
stages:
  - strategy: keep_largest_norm
    at: 2
    keep: 0.25
"""


def call(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a command that sees neither the source tree nor the caller's plugins."""
    drop = {"PYTHONPATH", "PYTHONHOME", "TOKENREDUCE_DISABLE_PLUGINS"}
    environment = {key: value for key, value in os.environ.items() if key not in drop}
    run = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert not check or run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a fresh virtual environment that holds both wheels, and finds their dependencies in ours."""
    work = tmp_path_factory.mktemp("plugin_package")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for folder in ("tokenreduce", "adapters"):
        shutil.copytree(ROOT / folder, work / "source" / folder, ignore=unwanted)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, work / "source")
    shutil.copytree(EXAMPLE, work / "example", ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["-q", "--no-deps", "--no-index"]
    call(*pip, "wheel", *offline, "--no-build-isolation", "-w", "dist", "./source", "./example", cwd=work)
    environment = work / "venv"
    venv.create(environment, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    wheels = sorted((work / "dist").glob("*.whl"))
    assert [wheel.name.split("-")[0] for wheel in wheels] == ["tokenreduce", "tokenreduce_example_plugin"]
    python = environment / "bin" / "python"
    call(*pip, "--python", python, "install", *offline, "--ignore-installed", *wheels, cwd=work)
    return environment / "bin"


def test_strategies_are_listed_with_their_origin(installed: Path, tmp_path: Path) -> None:
    run = call(installed / "tokenreduce", "strategies", "--json", cwd=tmp_path)
    origins = {entry["name"]: entry["origin"] for entry in json.loads(run.stdout)}
    assert origins["keep_largest_norm"] == "tokenreduce-example-plugin"
    assert origins["fastv"] == "tokenreduce"


def test_yaml_may_name_the_strategy_and_the_preset(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(PIPELINE)
    (tmp_path / "bad.yaml").write_text(PIPELINE.replace("at: 2", "order: 3"))
    files = ("mine.yaml", "bad.yaml", "keep_largest_norm", "framefusion")
    run = call(installed / "tokenreduce", "validate", *files, cwd=tmp_path, check=False)
    assert run.stdout == "mine.yaml: ok\nkeep_largest_norm: ok\nframefusion: ok\n"
    assert (run.returncode, run.stderr) == (2, "error: bad.yaml:5:12: stages[0].order: expected 1 or 2, got 3\n")


def test_it_reduces_a_model_and_its_observer_is_told(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(PIPELINE)
    run = call(installed / "python", "-W", "error", "-c", RUN.replace("PIPELINE", "mine.yaml"), cwd=tmp_path)
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["kept"] == result["expected"]
    assert result["tokens"] == [29, 29, 11, 11]
    assert all(file.startswith(str(installed.parent)) for file in result["files"])
    assert "keep_largest_norm at layer[2].pre_attention: 29 to 11 tokens" in run.stderr


@pytest.mark.parametrize("file", ["pyproject.toml", *(f"src/tokenreduce_example_plugin/{name}" for name in SHOWN)])
def test_the_documentation_shows_the_package_as_it_is(file: str) -> None:
    assert (EXAMPLE / file).read_text().strip() in (ROOT / "docs" / "plugins.md").read_text()
