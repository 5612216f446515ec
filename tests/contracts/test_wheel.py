"""The wheel that `make wheel` builds, in a fresh environment: it holds what it needs and nothing that only we run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRY = """
import sys, torch, tokenreduce as tr
assert tr.__file__.startswith(sys.argv[1]), tr.__file__
model = tr.load_model("embedded")
assert sum(weight.numel() for weight in model.parameters()) > 2e6
print(tr.plan("framefusion", model, frames=8).relative_tokens, tr.load_pipeline("fastv").name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built by the recipe's own command, of a copy of the tree."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*", "dist", "results", "*.png")
    shutil.copytree(ROOT, source, ignore=unwanted, symlinks=True)
    recipe = re.search(r"^wheel:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    (build,) = (line.strip() for line in recipe[1].splitlines() if "pip wheel" in line)
    command = build.replace("$(BIN)/python", sys.executable).split()
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=_outside())
    (built,) = (source / "dist").glob("*.whl")
    return built


def _outside() -> dict[str, str]:
    """An environment that does not see the source tree."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top.split("-")[0] for top in tops} == {"tokenreduce", "tokenreduce_adapters"}
    for needed in (
        "py.typed",
        "presets/framefusion.yaml",
        "planning/data/architectures.yaml",
        "testbed/weights/config.json",
    ):
        assert f"tokenreduce/{needed}" in names
    templates = {path.name for path in (ROOT / "tokenreduce" / "compare" / "templates").iterdir()}
    assert {f"tokenreduce/compare/templates/{name}" for name in templates} <= set(names)


def test_it_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """Dependencies are found in ours: they are not what is tried here."""
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(fresh), "platbase": str(fresh)}))
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    python = fresh / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    install = [*pip, "install", "-q", "--no-deps", "--no-index", "--ignore-installed", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, env=_outside())
    doctor = subprocess.run(
        [fresh / "bin" / "tokenreduce", "doctor"], cwd=tmp_path, capture_output=True, text=True, env=_outside()
    )
    assert (doctor.returncode, doctor.stderr) == (0, "")
    assert doctor.stdout.startswith("tokenreduce ")
    tried = subprocess.run(
        [python, "-W", "error", "-c", TRY, str(fresh)], cwd=tmp_path, capture_output=True, text=True, env=_outside()
    )
    assert tried.returncode == 0, tried.stderr
    share, name = tried.stdout.split()
    assert 0 < float(share) <= 0.3
    assert name == "fastv"
