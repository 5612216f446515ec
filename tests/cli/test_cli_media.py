"""`tokenreduce run` on media as people have them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.videos import write_timed

from tokenreduce.cli import main

RECORDING = [round(i * 1000 / 30) for i in range(60)] + list(range(2000, 60000, 2000))
QUICK = ["--repeats", "1", "--new-tokens", "1", "--device", "cpu", "--pipeline", "fastv", "--budget", "0.8"]


def run(video: str | Path, output: Path, *options: str) -> dict[str, object]:
    assert main(["run", str(video), *QUICK, *options, "--output", str(output)]) == 0
    summary: dict[str, object] = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    return summary


def test_a_screen_recording_is_seen_as_long_as_it_is(tmp_path: Path) -> None:
    path = write_timed(tmp_path / "screen.webm", "libvpx", RECORDING)
    summary = run(path, tmp_path / "out", "--max-frames", "64")
    assert summary["duration"] == 58.033
    assert summary["frame_times"] == [0.0, 1.0, *range(2, 60, 2)]


@pytest.mark.filterwarnings("default:.*truncated")
def test_a_truncated_file_goes_on_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_timed(tmp_path / "cut.mkv", "libx264", [40 * i for i in range(100)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    lost = f"{len(data) - len(data) * 2 // 3:,} of {len(data):,} bytes"
    assert main(["run", str(path), *QUICK, "--output", str(tmp_path / "no")]) == 2
    assert f"truncated, {lost}" in capsys.readouterr().err
    summary = run(path, tmp_path / "out", "--allow-truncated")
    assert lost in str(summary["missing"])
    assert "warning: " in capsys.readouterr().err


def test_a_folder_of_frames(tmp_path: Path) -> None:
    for i in range(3):
        Image.fromarray(np.full((48, 48, 3), 60 * i, np.uint8)).save(tmp_path / f"f{i}.png")
    summary = run(tmp_path, tmp_path / "out", "--fps", "0.5")
    assert (summary["duration"], summary["frame_times"]) == (6.0, [0.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fps", "0"], "fps must be a number above 0, got 0.0"),
        (["--max-frames", "0"], "max_frames must be a whole number, at least 1, got 0"),
        (["--question", ""], "the question is empty"),
    ],
)
def test_nonsense_is_not_taken_as_unset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    path = write_timed(tmp_path / "a.mp4", "libx264", [0, 40, 80])
    assert main(["run", str(path), *QUICK, *options, "--output", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_url_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "https://example.org/a.mp4", *QUICK, "--output", str(tmp_path / "out")]) == 2
    assert "error: https://example.org/a.mp4: a URL; download it first" in capsys.readouterr().err


def test_the_demo_runs_beside_the_folder_that_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make demo` twice: the folder `demo` holds pictures, and is not taken for frames of a video."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    for name in ("comparison.png", "tokens_per_layer.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "demo" / name)
    assert main(["run", "demo", *QUICK, "--output", "demo", "--force"]) == 0
    assert "on the cyan tile?" in capsys.readouterr().out
