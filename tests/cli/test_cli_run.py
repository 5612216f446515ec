"""`tokenreduce run` and `plan`: a real clip through the embedded model, and every kind of bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tokenreduce.cli import main


def write_video(path: Path, frames: int) -> Path:
    """An mp4 of a square that moves over a still background."""
    ground = np.tile(np.linspace(40, 200, 96, dtype=np.uint8)[:, None, None], (1, 128, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number in range(frames):
            picture = ground.copy()
            picture[20:50, 5 * number % 90 : 5 * number % 90 + 30] = (250, 30, 30)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("clips") / "square.mp4", 60)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must exit with code 2, and return its one line of complaint."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert "Traceback" not in captured.err + captured.out
    return lines[0]


def test_run_writes_what_it_says(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    arguments = ["run", str(clip), "--question", "What moves?", "--fps", "5", "--repeats", "1", "--new-tokens", "2"]
    for name in ("framefusion", "fastv", "streaming_llm"):
        arguments += ["--pipeline", name]
    assert main([*arguments, "--budget", "0.4", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    assert [arm["name"] for arm in summary["arms"]] == ["dense", "framefusion", "fastv", "streaming_llm"]
    dense = summary["arms"][0]["tokens_per_layer"]
    for arm in summary["arms"][1:]:
        trace = json.loads((folder / arm["name"] / "trace.json").read_text())
        assert [layer["tokens"][0] for layer in trace["layers"]] == arm["tokens_per_layer"]
        assert 0.4 - 1 / dense[0] < sum(arm["tokens_per_layer"]) / sum(dense) <= 0.4
        assert arm["kv_cache_bytes"] == trace["kv_bytes"]
        assert arm["name"] in out
    for picture in ("tokens_per_layer.png", "comparison.png", "framefusion/kept.png"):
        with Image.open(folder / picture) as image:
            assert image.size[0] > 200
    assert "no such" not in fails(capsys, *arguments, "--output", folder)
    before = (folder / "summary.json").read_bytes()
    assert "exists" in fails(capsys, *arguments, "--output", folder)
    assert (folder / "summary.json").read_bytes() == before


def test_one_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = write_video(tmp_path / "one.mp4", 1)
    code = main(
        ["run", str(video), "--budget", "0.8", "--repeats", "1", "--new-tokens", "1", "--output", str(tmp_path / "o")]
    )
    assert code == 0
    assert "framefusion" in capsys.readouterr().out


def test_bad_videos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", tmp_path / "out"]
    assert "missing.mp4" in fails(capsys, "run", tmp_path / "missing.mp4", *out)
    text = tmp_path / "text.mp4"
    text.write_text("not a video")
    assert "text.mp4" in fails(capsys, "run", text, *out)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert "empty.mp4" in fails(capsys, "run", empty, *out)
    assert str(tmp_path) in fails(capsys, "run", tmp_path, *out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("budget", "part"),
    [
        ("0", "above 0"),
        ("-0.3", "budget"),
        ("nan", "budget"),
        ("inf", "budget"),
        ("1.5", "above 1"),
        ("lots", "share such as 0.3"),
    ],
)
def test_bad_budgets(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], budget: str, part: str) -> None:
    line = fails(capsys, "run", clip, f"--budget={budget}", "--output", tmp_path / "out")
    assert part in line
    assert part in fails(capsys, "plan", "framefusion", f"--budget={budget}")


def test_infeasible_budget_names_the_smallest(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "run", clip, "--budget", "0.01", "--output", tmp_path / "out")
    assert "smallest feasible budget here is 0." in line
    smallest = line.rsplit(" ", 1)[1]
    arguments = ["--repeats", "1", "--new-tokens", "1", "--output", str(tmp_path / "out")]
    assert main(["run", str(clip), "--budget", smallest, *arguments]) == 0
    capsys.readouterr()
    line = fails(capsys, "plan", "fastv", "--budget", "0.05")
    assert "smallest feasible" in line
    assert main(["plan", "fastv", "--budget", line.rsplit(" ", 1)[1]]) == 0


def test_bad_pipelines(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", tmp_path / "out"]
    assert "did you mean 'framefusion'" in fails(capsys, "run", clip, "--pipeline", "framefusio", *out)
    file = tmp_path / "deep.yaml"
    file.write_text("name: deep\nbudget: 0.3\nstages:\n  - strategy: fastv\n    at: 40\n")
    assert "layers 0 … 11" in fails(capsys, "run", clip, "--pipeline", file, *out)
    assert "layers 0 … 27" in fails(capsys, "plan", file)
    file.write_text("name: none\nstages:\n  - strategy: importance_prune\n")
    assert "give `budget`" in fails(capsys, "run", clip, "--pipeline", file, *out)
    file.write_text("name: idle\nbudget: 0.3\nstages:\n  - strategy: similarity_merge\n    threshold: 0.9\n")
    assert "chooses its count" in fails(capsys, "run", clip, "--pipeline", file, *out)
    file.write_text("name: early\nbudget: 0.3\nstages:\n  - strategy: fastv\n    at: 0\n")
    assert "before layer 0" in fails(capsys, "run", clip, "--pipeline", file, *out)
    assert not (tmp_path / "out").exists()


def test_bad_models_and_folders(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, "plan", "framefusion", "--model", "llava-vidoe-7b")
    assert "did you mean 'llava-video-7b'" in line
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    assert "model" in fails(capsys, "run", clip, "--model", tmp_path / "model", "--output", tmp_path / "out")
    file = tmp_path / "file"
    file.touch()
    assert "not a folder" in fails(capsys, "run", clip, "--output", file)
    assert "cannot be written" in fails(capsys, "run", clip, "--output", file / "below")
    png = tmp_path / "plan.png"
    png.write_text("mine")
    assert "exists" in fails(capsys, "plan", "fastv", "--output", png)
    assert png.read_text() == "mine"


def test_plan_is_what_a_run_does(capsys: pytest.CaptureFixture[str]) -> None:
    """FastV's closed form, keep = (L·C − K)/(L − K), on the known 7B decoder, and the plan's own sums."""
    assert main(["plan", "fastv", "merge_only", "--json", "--frames", "64", "--budget", "0.3"]) == 0
    plans = json.loads(capsys.readouterr().out)
    tokens = [layer["tokens"] for layer in plans["fastv"]["layers"]]
    n = 34 + 64 * 210
    assert tokens[:2] == [n, n]
    assert set(tokens[2:]) == {int((28 * 0.3 * n - 2 * n) / 26)}
    assert plans["merge_only"]["layers"][0]["tokens"] == int(0.3 * n)
    for plan in plans.values():
        assert plan["flops"] >= sum(layer["flops"] for layer in plan["layers"])
        assert plan["relative_tokens"] <= 0.3


def test_plan_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = tmp_path / "plan.png"
    assert main(["plan", "framefusion", "streaming_llm", "--model", "minicpm-v-2.6", "--output", str(png)]) == 0
    assert str(png) in capsys.readouterr().out
    with Image.open(png) as image:
        assert image.size[0] > 400


def test_plan_finds_the_longest_video_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "framefusion", "fastv", "--json", "--memory"]
    frames: dict[str, list[int]] = {"dense": [], "framefusion": [], "fastv": []}
    for memory in ("15.2GiB", "16GiB", "18GiB", "40GiB"):
        assert main([*arguments, memory]) == 0
        found = json.loads(capsys.readouterr().out)
        for name, row in found["plans"].items():
            frames[name].append(row["frames_by_memory"])
            assert row["total"] == sum(row[part] for part in ("weights", "inputs", "kv", "activations"))
            assert row["total"] <= found["memory"]
            if row["limit"] == "memory":
                assert row["needed"] > found["memory"]
            else:
                # LLaVA-Video's 32,768 positions are 155 frames, whatever is merged.
                assert (row["limit"], row["frames"]) == ("positions", 155)
                assert row["frames_by_memory"] > 155
    assert all(rows == sorted(rows) for rows in frames.values())
    assert all(a <= b for name in ("framefusion", "fastv") for a, b in zip(frames["dense"], frames[name], strict=True))
    assert frames["dense"][0] < frames["framefusion"][0]


def test_plan_says_what_ends_the_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "framefusion", "--memory", "18GiB"]) == 0
    out = capsys.readouterr().out
    assert "memory: one more frame takes 18.0" in out
    assert "positions (32,768); memory at" in out
    # An amount of tokens is out of reach for a long video: the layers before FastV acts hold more.
    file = tmp_path / "amount.yaml"
    file.write_text("name: amount\nbudget: {tokens: 2000}\nstages:\n  - strategy: fastv\n")
    assert main(["plan", str(file), "--memory", "80GiB", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)["plans"]["amount"]
    assert row["limit"] == "budget"
    later = 26 * (34 + 1)
    assert row["tokens"] * 2 + later <= 2000 * 28 < (row["tokens"] + 210) * 2 + later
    # A share is out of reach for a short one, where the text weighs more.
    assert main(["plan", "fastv", "--memory", "16GiB", "--budget", "0.08", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"]["fastv"]["frames"] > 10


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--memory", "24"], "such as 24GiB"),
        (["--memory", "24 gigs"], "such as 24GiB"),
        (["--memory=-1GiB"], "such as 24GiB"),
        (["--memory", "0GiB"], "above 0"),
        (["--memory", "24GiB", "--frames", "64"], "leave out --frames"),
        (["--memory", "24GiB", "--output", "plan.png"], "leave out --frames and --output"),
        (["--memory", "12GiB"], "weights alone take 14.96 GiB in bfloat16"),
        (["--memory", "14.96GiB"], "with one frame 15.00 GiB"),
        (["--memory", "24GiB", "--dtype", "bfloat"], "did you mean 'bfloat16'"),
        (["--memory", "24GiB", "--budget", "0.01"], "smallest feasible"),
    ],
)
def test_bad_memory(capsys: pytest.CaptureFixture[str], arguments: list[str], part: str) -> None:
    assert part in fails(capsys, "plan", "fastv", *arguments)
