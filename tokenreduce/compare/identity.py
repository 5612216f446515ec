"""What a comparison's results depend on, by content: files of models, videos, code of strategies, versions, the device.

A file is hashed whole. What that gave is remembered, in the user's cache folder, by the file's device, inode, size and both its
times, so that 15 GB are read once.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from tokenreduce import plugins
from tokenreduce.config.json_source import read_object, shown
from tokenreduce.config.outputs import write_file
from tokenreduce.errors import CheckpointError, TokenReduceError
from tokenreduce.hookspecs import PROJECT
from tokenreduce.models.loading import checkpoint_folder
from tokenreduce.models.placement import best_device, device_name
from tokenreduce.pipeline import Pipeline
from tokenreduce.testbed.embedded import EMBEDDED, WEIGHTS

Say = Callable[[str], None]
"""Told in a line what goes on."""
PARTS = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""Endings of the files of a checkpoint that decide what a model answers."""
SMALL = 1 << 20
"""Bytes up to which a file is hashed each time."""
YOUNG = 2.0
"""Seconds: a file changed so lately could change again without its times telling."""
PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "av", "pillow")
REPORTING = ("cli", "compare/report.py", "compare/tables.py", "compare/templates", "lab")
"""Of our own code, what shows results and makes none."""


def content_hash(file: Path, say: Say = lambda line: None) -> str:
    """SHA-256 of a file's content, in hex. TokenReduceError where it is no regular file or cannot be read."""
    try:
        found = file.stat()
        if not file.is_file():
            raise TokenReduceError(f"{shown(file)}: is not a regular file")
        key = f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"
        if found.st_size > SMALL and key in _remembered():
            return _remembered()[key]
        digest, done, told = hashlib.sha256(), 0, time.monotonic()
        with file.open("rb") as opened:
            while block := opened.read(1 << 22):
                digest.update(block)
                done += len(block)
                if time.monotonic() - told > 1:
                    told = time.monotonic()
                    say(f"hashing {file.name}: {done / 1e9:.1f} of {found.st_size / 1e9:.1f} GB")
        after = file.stat()
    except OSError as error:
        raise TokenReduceError(f"{shown(file)}: cannot be read ({error.strerror or error})") from None
    settled = time.time() - max(after.st_mtime, after.st_ctime) > YOUNG
    if (
        found.st_size > SMALL
        and settled
        and (after.st_mtime_ns, after.st_ctime_ns) == tuple(map(int, key.split(":")[3:]))
    ):
        _remember(key, digest.hexdigest())
    return digest.hexdigest()


def model_files(model: str, say: Say = lambda line: None) -> dict[str, str]:
    """SHA-256 of each file that decides what a model answers, by its path in the checkpoint's folder.

    model: a folder, `embedded`, or a hub name, whose files are fetched if they are not here.
    """
    folder = WEIGHTS if model == EMBEDDED else checkpoint_folder(model)
    files = sorted(file for file in folder.rglob("*") if file.suffix in PARTS and file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    if not files and model != EMBEDDED:
        raise CheckpointError(f"{shown(folder)}: holds no file of a checkpoint ({', '.join(PARTS)})")
    return {file.relative_to(folder).as_posix(): content_hash(file, say) for file in files}


def code(pipelines: Iterable[Pipeline]) -> dict[str, str]:
    """Version and hash of the code of tokenreduce and of every third party that brings a strategy in use or an adapter."""
    offered = plugins.offered_strategies()
    used = {stage.strategy for pipeline in pipelines for stage in pipeline.stages}
    offers: list[tuple[str, type]] = [(offered[name].origin, offered[name].item) for name in sorted(used)]
    offers += [(offer.origin, offer.item) for offer in plugins.offered_adapters().values()]
    found: dict[str, str] = {PROJECT: _own_code()}
    for origin, item in offers:
        if origin != PROJECT:
            found[f"{origin}: {item.__module__}"] = f"{_version(origin)} {_code_of(item)}"
    return found


def environment(device: Any = None) -> dict[str, str]:
    """Versions of what computes, and the device. device: the one asked for, if any."""
    kind = str(device or best_device())
    if kind.startswith("cuda"):
        kind = f"{kind} ({device_name(kind)})"
    elif kind == "cpu":
        kind = f"cpu ({_processor()})"
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}, "device": kind}


def combined(digests: dict[str, str]) -> str:
    """One digest for many."""
    return f"sha256 {hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()}"


def difference(there: Any, here: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first place where two plain values differ: its name and both values there; None where they are equal."""
    if there == here:
        return None
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**here, **there}:
            found = difference(there.get(key), here.get(key), f"{name} {key}".strip())
            if found is not None:
                return found
    return name, there, here


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except (metadata.PackageNotFoundError, ValueError):
        return "of no version"


@cache
def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _own_code() -> str:
    root = Path(__file__).parents[1]
    files = [file for file in sorted(root.rglob("*")) if file.suffix in (".py", ".yaml") and file.is_file()]
    kept = [file for file in files if not file.relative_to(root).as_posix().startswith(REPORTING)]
    return f"{_version(PROJECT)} {_hash_of(root, kept)}"


def _code_of(item: type) -> str:
    """Hash of all files of the package that a class is from; of its source where it is from no file."""
    module = sys.modules.get(item.__module__.partition(".")[0])
    file = getattr(module, "__file__", None)
    folders = [Path(path) for path in getattr(module, "__path__", [])]
    if folders:
        files = [
            each for folder in folders for each in sorted(folder.rglob("*")) if each.suffix in (".py", ".so", ".yaml")
        ]
        return _hash_of(folders[0].parent, files)
    if file is not None and Path(file).is_file():
        return _hash_of(Path(file).parent, [Path(file)])
    try:
        return hashlib.sha256(inspect.getsource(item).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return "code that cannot be read"


def _hash_of(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        if "__pycache__" not in file.parts and file.is_file():
            digest.update(
                os.path.relpath(file, root).encode("utf-8", "surrogateescape") + b"\0" + file.read_bytes() + b"\0"
            )
    return digest.hexdigest()[:16]


_LOCK = threading.Lock()


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenreduce" / "hashes.json"


@cache
def _remembered() -> dict[str, str]:
    with suppress(TokenReduceError, RuntimeError):
        held = read_object(_cache_file(), TokenReduceError)
        return {key: value for key, value in held.items() if isinstance(value, str) and len(value) == 64}
    return {}


def _remember(key: str, digest: str) -> None:
    with _LOCK:
        known = _remembered()
        known[key] = digest
        with suppress(OSError, RuntimeError):
            _cache_file().parent.mkdir(parents=True, exist_ok=True)
            write_file(_cache_file(), json.dumps(dict(list(known.items())[-10_000:])))
