"""Compiles and loads `guard.cpp`, once per version of torch and per user."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("guard.cpp")


@functools.cache
def missing() -> str:
    """Why there can be no pretended GPU here; empty where there can, and then the guard is loaded."""
    if torch.cuda.is_available() or torch.version.cuda is not None:
        return "this torch has CUDA of its own; GPUs are pretended in a CPU build only"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return "no C++ compiler (g++ or clang++) for the device guard of the pretended GPU"
    facts = torch.__version__.encode() + SOURCE.read_bytes()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    library = caches / "tokenreduce-tests" / f"guard-{hashlib.sha256(facts).hexdigest()[:16]}.so"
    if not library.exists():
        _compile(compiler, library)
    torch.ops.load_library(str(library))
    return ""


def _compile(compiler: str, library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:  # Workers of pytest-xdist may do it at once.
        made = Path(scratch) / "guard.so"
        command = [compiler, "-O1", "-std=c++20", "-shared", "-fPIC", str(SOURCE), "-o", str(made)]
        command += ["-I", str(folder / "include"), "-L", str(folder / "lib"), "-lc10"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(library)
