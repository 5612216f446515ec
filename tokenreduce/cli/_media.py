"""What `run` is asked: a video file or the demo, and the model to ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenreduce.errors import MediaError
from tokenreduce.media.video import FPS, VideoClip, decode_frames, sample_indices, video_info
from tokenreduce.testbed.embedded import EMBEDDED, MAX_FRAMES

DEMO = "demo"
DEFAULT_QUESTION = "Describe the video."
DEMO_FRAMES, DEMO_SEED, DEMO_SIDE = 16, 1, 288


@dataclass
class Asking:
    """A question about frames, and the model to put it to."""

    name: str
    """Of the video; names the output folder."""
    question: str
    """Text."""
    model: str
    """Checkpoint folder, hub name or `embedded`."""
    clip: VideoClip
    """The sampled frames."""
    shown: NDArray[np.uint8]
    """The same frames as the report draws them, (F, H, W, 3) uint8 RGB."""
    expected: str | None = None
    """The answer, where it is known."""
    notes: list[str] = field(default_factory=list)
    """Lines to tell the user about the model."""

    def load(self, loading: dict[str, Any]) -> tuple[Any, list[str]]:
        """The model in eval mode, and lines to tell the user about it. loading: arguments of `load_model`."""
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        if self.model == EMBEDDED:
            from tokenreduce.testbed.embedded import load_embedded

            model = load_embedded(**loading)
            if not model.is_trained:
                self.notes.append(
                    "the embedded model has random weights: its answers mean nothing, its counts and times do"
                )
            return model, self.notes
        from tokenreduce.models import load_model

        return load_model(self.model, **loading), self.notes

    def prepare(self, model: Any) -> Any:
        """Inputs for `model`."""
        from tokenreduce.models import prepare

        clip = self.clip
        # The embedded model spells numbers digit by digit: frame times would be a third of its input.
        times = self.model != EMBEDDED
        return prepare(
            model,
            list(clip.frames),
            self.question,
            frame_times=clip.times,
            duration=clip.duration,
            time_instruction=times,
        )

    def decoder(self, model: Any) -> Callable[[Any], str] | None:
        """Token ids to text, by the tokenizer in the checkpoint's folder."""
        from tokenreduce.models.tokenizer import has_tokenizer, read_tokenizer

        folder = Path(model.name_or_path)
        if not has_tokenizer(folder):
            return None
        tokenizer = read_tokenizer(folder, model.config.get_text_config())
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def read_question(video: str, question: str, model: str, fps: float | None, max_frames: int | None) -> Asking:
    """Decode and sample `video`. Raises MediaError where it cannot be read."""
    if video == DEMO and not Path(video).is_file():
        return _demo(question, model)
    info = video_info(video)
    most = max_frames or (MAX_FRAMES if model == EMBEDDED else 64)
    indices = sample_indices(info.frames, info.fps, fps or FPS, most)
    clip = VideoClip.of(info, indices, decode_frames(video, indices, info=info))
    return Asking(Path(video).stem, question or DEFAULT_QUESTION, model, clip, clip.array())


def _demo(question: str, model: str) -> Asking:
    """A real clip with numbered tiles drawn into some frames; the same tiles larger for the eye."""
    from tokenreduce.testbed.clips import demo_clip
    from tokenreduce.testbed.needle import NeedleSpec, NeedleTask

    spec = NeedleSpec(frames=DEMO_FRAMES, clips=(demo_clip(),))
    example = NeedleTask(spec).example(DEMO_SEED, 0)
    larger = NeedleTask(replace(spec, resolution=DEMO_SIDE)).example(DEMO_SEED, 0)
    if larger.turns != example.turns:
        raise MediaError("the demo's two renderings differ; this is a bug of tokenreduce")
    frames = list(example.frames)
    clip = VideoClip(frames, [i / FPS for i in range(len(frames))], len(frames) / FPS, FPS, list(range(len(frames))))
    expected = None if question else example.answer
    return Asking(DEMO, question or example.question, model, clip, larger.frames, expected)
