"""One comparison never holds results of different things, loses none that are finished, and has one writer and many readers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.compare_tools import write_clip

from tokenreduce import plugins
from tokenreduce.compare import identity
from tokenreduce.compare.arms import expand
from tokenreduce.compare.conversation import Reply, kl_divergence
from tokenreduce.compare.run import report_only
from tokenreduce.compare.settings import Settings
from tokenreduce.compare.store import Store
from tokenreduce.config.outputs import PART, file_names, replacing, write_file
from tokenreduce.errors import TokenReduceError

ROOT = Path(__file__).parents[2]
PLUGIN = """
from typing import Literal
from tokenreduce.hookspecs import hookimpl
from tokenreduce.strategy import Capabilities, StageConfig, Strategy

class Keep(Strategy):
    '''Keep all.'''
    name = "keep_these"
    capabilities = Capabilities(sites=("pre_attention",))

    class Config(StageConfig):
        strategy: Literal["keep_these"] = "keep_these"

    def decide(self, ctx):
        return None

@hookimpl
def tokenreduce_strategies():
    return [Keep]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model folder (its weights are not read), a folder of videos, and an installed plugin."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    identity._remembered.cache_clear()
    model, videos, site = tmp_path / "model", tmp_path / "videos", tmp_path / "site"
    for folder in (model, videos, site / "theirs-1.0.dist-info"):
        folder.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(3 << 20))
    (model / "config.json").write_text('{"a": 1}')
    (model / "tokenizer.json").write_text('{"b": 1}')
    write_clip(videos / "a.mp4", frames=4)
    (videos / "questions.jsonl").write_text(json.dumps({"video": "a.mp4", "question": "q", "answer": "x"}))
    write_clip(tmp_path / "needle.mp4", frames=4)
    (site / "theirs.py").write_text(PLUGIN)
    (site / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (site / "theirs-1.0.dist-info" / "entry_points.txt").write_text("[tokenreduce]\nplugin = theirs\n")
    (tmp_path / "mine.yaml").write_text("name: mine\nstages: [{strategy: keep_these}]\n")
    monkeypatch.syspath_prepend(site)
    plugins.manager.cache_clear()
    yield tmp_path
    sys.modules.pop("theirs", None)
    plugins.manager.cache_clear()
    identity._remembered.cache_clear()


def settings_of(place: Path, task: str = "videos") -> dict[str, Any]:
    """The settings of a comparison there, as another process would find them."""
    identity._remembered.cache_clear()
    arms = tuple(expand([str(place / "mine.yaml")], [], [str(place / "model")]))
    needle = {"kind": "one_hop", "frames": (4,), "positions": None, "size": 1, "placement": "edit"}
    options = {**needle, "clips": (str(place / "needle.mp4"),)} if task == "needle" else {}
    name = task if task == "needle" else str(place / task)
    settings = Settings(name, arms, examples=1, seed=1, baseline="dense", task_options=options)
    return settings.to_dict(settings.open_task())


def in_place(path: Path, data: bytes) -> None:
    """Other content of the same name and size, in the same inode, with the old times put back."""
    held = path.stat()
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns))
    assert path.stat().st_size == held.st_size


def other_version(site: Path) -> None:
    (site / "theirs-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.1\n")


def flipped(path: Path) -> bytes:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    return bytes(data)


def edited(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


CHANGES: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], object], str]] = {
    "weights in place": (lambda p, _: in_place(f := p / "model/model.safetensors", flipped(f)), "files .*model.safetensors is"),
    "config": (lambda p, _: edited(p / "model/config.json", "1", "2"), r"files .*config\.json is"),
    "tokenizer": (lambda p, _: edited(p / "model/tokenizer.json", "1", "2"), r"files .*tokenizer\.json is"),
    "a file more": (lambda p, _: write_file(p / "model/chat_template.jinja", "x"), r"files .*chat_template\.jinja is null there"),
    "a file fewer": (lambda p, _: (p / "model/tokenizer.json").unlink(), r"files .*tokenizer\.json is .* and null here"),
    "video in place": (lambda p, _: in_place(f := p / "videos/a.mp4", flipped(f)), r"task (sha256|videos a\.mp4) is"),
    "question": (lambda p, _: edited(p / "videos/questions.jsonl", '"q"', '"r"'), "task sha256 is"),
    "plugin's code": (lambda p, _: edited(p / "site/theirs.py", "return None", "return  None"), "code theirs: theirs is"),
    "plugin's version": (lambda p, _: other_version(p / "site"), r"code theirs: theirs is \"1\.0 .* and \"1\.1"),
    "pipeline": (lambda p, _: edited(p / "mine.yaml", "keep_these}", "keep_these, at: 1}"), "arms is other pipelines"),
    "torch": (lambda _, m: m.setattr(identity, "_version", lambda name: "0" if name == "torch" else "1"), "environment torch is"),
    "device": (lambda _, m: m.setattr(identity, "_processor", lambda: "another"), "environment device is"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_runs_is_refused_by_name(
    place: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "torch":
        monkeypatch.setattr(identity, "_version", lambda name: "1")
    store = Store.create_or_resume(place / "out", settings_of(place))
    store.append([{"model": str(place / "model"), "index": 0, "arm": arm} for arm in ("dense", "mine")])
    store.close()
    Store.create_or_resume(place / "out", settings_of(place)).close()
    act, named = CHANGES[change]
    act(place, monkeypatch)
    with pytest.raises(
        TokenReduceError, match=rf"holds a comparison with other settings: {named}.*; give another --output, or"
    ):
        Store.create_or_resume(place / "out", settings_of(place))


def test_a_clip_of_another_content_is_another_task(place: Path) -> None:
    before = settings_of(place, "needle")["task"]
    in_place(place / "needle.mp4", flipped(place / "needle.mp4"))
    assert settings_of(place, "needle")["task"] != before


def test_equal_content_elsewhere_is_the_same_model(place: Path) -> None:
    before = identity.model_files(str(place / "model"))
    shutil.copytree(place / "model", place / "copy")
    assert identity.model_files(str(place / "copy")) == before


def test_a_file_is_hashed_once_and_again_after_any_change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "YOUNG", -1e9)  # Else a file is believed only when its times have settled.
    file = place / "model" / "model.safetensors"
    first = identity.content_hash(file)
    assert list(json.loads((place / "cache/tokenreduce/hashes.json").read_text()).values()) == [first]
    identity._remembered.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(identity.hashlib, "sha256", None)
        assert identity.content_hash(file) == first
    in_place(file, flipped(file))
    assert identity.content_hash(file) != first


# Outcomes


def test_nan_is_not_agreement() -> None:
    good, bad = Reply([1], [torch.tensor([0.0, 1.0])]), Reply([0], [torch.tensor([float("nan"), 1.0])])
    forbidden = Reply([1], [torch.tensor([float("-inf"), 1.0])])
    assert kl_divergence(good, good) == 0
    assert forbidden.finite
    for other in (bad, Reply([0], [torch.tensor([float("inf"), 1.0])]), Reply([0], [torch.full((2,), float("-inf"))])):
        assert not other.finite
        assert np.isnan(kl_divergence(good, other))
        assert np.isnan(kl_divergence(other, good))


# Writing

SETTINGS = {"seed": 1, "arms": [{"name": "dense", "model": "m"}, {"name": "x", "model": "m"}]}


def unit(index: int) -> list[dict[str, Any]]:
    return [{"model": "m", "index": index, "arm": arm, "note": "x" * 50} for arm in ("dense", "x")]


@pytest.mark.parametrize("room", [1, 60, 150])
def test_a_full_disk_in_the_middle_of_a_row_keeps_the_rows_before(tmp_path: Path, room: int) -> None:
    """In a process of its own whose files may grow by `room` bytes beyond the first unit."""
    code = f"""
import json, resource, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "adapters")!r}]
from pathlib import Path
from tokenreduce.compare.store import Store
from tokenreduce.errors import TokenReduceError
settings, units = json.loads(sys.argv[1])
store = Store.create_or_resume(Path(sys.argv[2]), settings)
store.append(units[0])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
size = (Path(sys.argv[2]) / "results.jsonl").stat().st_size + {room}
resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
try:
    store.append(units[1])
except TokenReduceError as error:
    print(error)
"""
    arguments = [json.dumps([SETTINGS, [unit(0), unit(1)]]), str(tmp_path / "o")]
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "all 1 examples finished before are safe" in run.stdout
    assert run.stdout.count("\n") == 1
    store = Store.create_or_resume(tmp_path / "o", SETTINGS)
    assert store.rows == unit(0)
    store.append(unit(1))
    store.close()


def test_concurrent_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    texts = [str(number) * 20_000 for number in range(8)]
    faults: list[BaseException] = []

    def work(text: str) -> None:
        try:
            for _ in range(10):
                write_file(tmp_path / "f", text)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert (tmp_path / "f").read_text() in texts
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_what_fails_leaves_the_old_file_and_no_half_one(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_text("old")

    def fail() -> None:
        with replacing(file) as part:
            part.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert file.read_text() == "old"
    assert not list(tmp_path.glob(f"*{PART}"))


def test_names_on_disk_never_collide() -> None:
    names = ["summary.json", "SUMMARY.json", "a/b", "a:b", "é" * 300, "é" * 301, "..", "dense"]
    found = file_names(names, {"summary.json"})
    assert len({each.casefold() for each in (*found.values(), "summary.json")}) == len(names) + 1
    assert all(0 < len(each.encode()) <= 210 and "/" not in each for each in found.values())
    assert found["dense"] == "dense"


def test_a_report_is_made_where_the_folder_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenreduce.compare import report

    arms = expand(["random"], ["0.5"], ["embedded"])
    settings = {
        "tokenreduce": "0", "task": {"task": "videos"}, "seed": 1, "examples": 4, "baseline": "dense", "new_tokens": 8,
        "models": {}, "arms": [arm.settings() for arm in arms],
    }  # fmt: skip
    Store.create_or_resume(tmp_path / "o", settings).close()
    honest = report.write_file

    def full(path: Path, text: str) -> None:
        if path.parent == tmp_path / "o":
            raise OSError(28, "No space left on device")
        honest(path, text)

    monkeypatch.setattr(report, "write_file", full)
    with pytest.warns(UserWarning, match=r"o cannot be written: No space left on device; the report is in .* instead"):
        summary = report_only(tmp_path / "o")
    assert (Path(summary["report"]) / "report.html").is_file()
    shutil.rmtree(summary["report"])
