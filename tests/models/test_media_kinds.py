"""prepare(): the kinds of video that it takes, batches, the hint on frames, and what it refuses by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.llava_video_golden import CHECKPOINT
from support.videos import write_timed
from transformers import PreTrainedModel

import tokenreduce as tr
from tokenreduce.errors import CheckpointError, MediaError, UnsupportedError
from tokenreduce.media.video import VideoClip
from tokenreduce.models import load_model, look, prepare
from tokenreduce.models.processing import video_metadata
from tokenreduce.models.request import VideoQuestion

FRAMES = np.random.default_rng(0).integers(0, 255, (12, 16, 24, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return load_model(CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def small() -> PreTrainedModel:
    return tr.load_model("embedded", device="cpu")


def same(made: Any, wanted: Any) -> bool:
    return made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in wanted)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    return tmp_path


class TestKinds:
    def test_frame_files_in_the_order_of_their_numbers(self, model: PreTrainedModel, folder: Path) -> None:
        wanted = prepare(model, FRAMES, "What?", fps=2.0)
        assert same(prepare(model, folder, "What?", fps=2.0), wanted)
        assert same(prepare(model, sorted(map(str, folder.glob("*.png"))), "What?", fps=2.0), wanted)
        assert same(prepare(model, f"file://{folder}", "What?", fps=2.0), wanted)
        clip = look(model, folder, fps=2.0, max_frames=3)
        assert (clip.indices, clip.times, clip.duration) == ([0, 5, 11], [0.0, 2.5, 5.5], 6.0)

    def test_pil_images(self, model: PreTrainedModel) -> None:
        images = [Image.fromarray(frame) for frame in FRAMES[:3]]
        assert same(prepare(model, images, "What?"), prepare(model, FRAMES[:3], "What?"))
        assert same(prepare(model, images[0], "What?"), prepare(model, FRAMES[:1], "What?"))

    def test_a_file_url_and_what_look_returned(self, model: PreTrainedModel, tmp_path: Path) -> None:
        path = write_timed(tmp_path / "a clip.mp4", "libx264", [0, 40, 80, 1500, 3000])
        wanted = prepare(model, path, "What?")
        assert same(prepare(model, path.as_uri(), "What?"), wanted)
        assert same(prepare(model, look(model, path), "What?"), wanted)

    def test_times_of_any_video_reach_transformers(self) -> None:
        even = VideoClip([FRAMES[0]] * 3, [0.0, 1.0, 2.0], 3.0, 25.0, [0, 25, 50], 75)
        assert video_metadata(even)["frames_indices"] == [0, 25, 50]
        uneven = VideoClip([FRAMES[0]] * 3, [0.0, 2.0, 58.0], 60.0, 1.5, [0, 60, 88], 89)
        told = video_metadata(uneven)
        assert [number / told["fps"] for number in told["frames_indices"]] == [0.0, 2.0, 58.0]
        assert told["total_num_frames"] / told["fps"] == 60.0


class TestBatches:
    @pytest.mark.parametrize("counts", [(3, 3), (2, 5)], ids=["same length", "other lengths"])
    def test_rows_answer_as_they_do_alone(self, small: PreTrainedModel, counts: tuple[int, int]) -> None:
        videos = [FRAMES[: counts[0]], list(FRAMES[-counts[1] :])]
        questions = ["Which digit is on the tile?", "How many tiles carry a digit, first or last?"]
        alone = [prepare(small, video, asked) for video, asked in zip(videos, questions, strict=True)]
        batch = prepare(small, videos, questions)
        lengths = [one["input_ids"].shape[1] for one in alone]
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert bool(batch["attention_mask"][:, -1].all()), "padded on the left"
        with torch.no_grad():
            for attach in (False, True):
                run = tr.reduce(small, "fastv", budget=0.8) if attach else None
                together = small(**batch).logits[:, -1]
                each = torch.cat([small(**one).logits[:, -1] for one in alone])
                if run is not None:
                    run.detach()
                assert torch.allclose(together, each, atol=2e-4)

    def test_times_of_each_video(self, model: PreTrainedModel) -> None:
        batch = prepare(model, [FRAMES[:1], FRAMES[:1]], ["A?", "A?"], frame_times=[[0.0], [5.0]], duration=[2.0, 9.0])
        for row, (time, seconds) in enumerate([(0.0, 2.0), (5.0, 9.0)]):
            alone = prepare(model, FRAMES[:1], "A?", frame_times=[time], duration=seconds)["input_ids"]
            assert torch.equal(batch["input_ids"][row, -alone.shape[1] :], alone[0])


class TestHint:
    def refused(self, model: PreTrainedModel, video: Any, **options: Any) -> int:
        with pytest.raises(UnsupportedError) as error:
            prepare(model, video, "What?", **options)
        found = re.search(r"use at most (\d+) frames", str(error.value))
        assert found is not None, str(error.value)
        return int(found[1])

    def test_of_frames(self, small: PreTrainedModel) -> None:
        frames = np.zeros((200, 8, 8, 3), np.uint8)
        most = self.refused(small, frames)
        assert most > 50
        assert prepare(small, frames[:most], "What?")["input_ids"].shape[1] <= 4096
        assert self.refused(small, frames[: most + 1]) == most

    def test_of_frames_with_times(self, small: PreTrainedModel) -> None:
        frames, times = np.zeros((200, 8, 8, 3), np.uint8), [i * 7.5 for i in range(200)]
        most = self.refused(small, frames, frame_times=times, duration=1500.0)
        assert most > 50
        for part in (slice(most), slice(-most, None)):
            prepare(small, frames[part], "What?", frame_times=times[part], duration=1500.0)

    def test_of_a_file(self, small: PreTrainedModel, tmp_path: Path) -> None:
        path = write_timed(tmp_path / "long.mp4", "libx264", [1000 * i for i in range(150)])
        most = self.refused(small, path, max_frames=150)
        assert prepare(small, path, "What?", max_frames=most)["input_ids"].shape[1] <= 4096
        assert self.refused(small, path, max_frames=most + 1) == most

    def test_when_not_even_one_fits(self, small: PreTrainedModel) -> None:
        with pytest.raises(UnsupportedError, match="not even one frame fits: shorten the question"):
            prepare(small, FRAMES[:2], "z " * 5000)


NAN = float("nan")


@pytest.mark.parametrize(
    ("video", "question", "options", "message"),
    [
        ("https://example.org/a.mp4", "?", {}, r"https://example.org/a.mp4: a URL; download it first"),
        ("rtsp://camera/1", "?", {}, "rtsp://camera/1: a URL"),
        ("file:///gone/a.mp4", "?", {}, "/gone/a.mp4: no such file"),
        (FRAMES, None, {}, "question must be text, got None"),
        (FRAMES, 3, {}, "question must be text, got 3"),
        (FRAMES, " ", {}, "question is empty"),
        ([FRAMES, FRAMES], ["a", None], {}, "question must be text, got None"),
        (FRAMES, ["a", "b"], {}, "list of 2 questions needs a list of as many videos, got one that is no list"),
        ([FRAMES], ["a", "b"], {}, "list of 2 questions needs a list of as many videos, got 1"),
        ([FRAMES], [], {}, "list of questions is empty"),
        ([FRAMES], ["a"], {"duration": 2.0}, "duration must have one entry for each of the 1 videos, got 2.0"),
        (["a.mp4", "b.mp4"], "a", {}, "a list of 2 files for one question, and a.mp4 is no picture"),
        (["a1.png", "a2.png"], "a", {}, "2 frame files do not say how far apart they are; give fps"),
        (["a1.png", "a2.png"], "a", {"fps": 1.0}, "a1.png: no such file"),
        (FRAMES, "?", {"fps": 0}, "fps must be a number above 0, got 0"),
        (FRAMES, "?", {"fps": NAN}, "fps must be a number above 0, got nan"),
        (FRAMES, "?", {"max_frames": 0}, "max_frames must be a whole number, at least 1, got 0"),
        (FRAMES, "?", {"max_frames": 2.5}, "at least 1, got 2.5"),
        (FRAMES[:2], "?", {"frame_times": [0, NAN], "duration": 2}, r"frame_times\[1\] must be .*, got nan"),
        (FRAMES[:2], "?", {"frame_times": [1.0, 0.5], "duration": 2}, r"must ascend: frame_times\[1\] is 0.5, after 1.0"),
        (FRAMES[:1], "?", {"frame_times": [-1.0], "duration": 2}, r"frame_times\[0\] must be .* got -1.0"),
        (FRAMES[:1], "?", {"duration": -2.0}, "duration must be a number of seconds from 0 on, got -2.0"),
        (FRAMES[:1], "?", {"duration": NAN}, "duration .*, got nan"),
        (7, "?", {}, "a path, an array of frames or a list of them, got a int"),
    ],
)  # fmt: skip
def test_refused_by_name(
    video: Any, question: Any, options: dict[str, Any], message: str, small: PreTrainedModel
) -> None:
    with pytest.raises(MediaError, match=message) as error:
        prepare(small, video, question, **options)
    assert "\n" not in str(error.value)


def test_a_folder_without_frames(small: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="a directory without frames"):
        prepare(small, tmp_path, "?", fps=1.0)


def test_the_embedded_model_has_a_name(small: PreTrainedModel) -> None:
    assert small.config.model_type == "llava_video"
    assert not small.training
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model("./embedded")


def test_an_equal_time_twice_is_in_order() -> None:
    assert VideoQuestion(FRAMES[:2], "?", frame_times=[1.0, 1.0], duration=2.0).clip(lambda *_: []).times == [1.0, 1.0]
