"""What `run` is asked: a video or the demo, and the model to ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenreduce.errors import MediaError
from tokenreduce.media.reader import local_path
from tokenreduce.media.video import FPS, MAX_FRAMES, VideoClip, VideoInfo, check_sampling, video_info
from tokenreduce.testbed.embedded import EMBEDDED, unread
from tokenreduce.testbed.embedded import MAX_FRAMES as EMBEDDED_FRAMES

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
    clip: VideoClip | None = None
    """The sampled frames; of a file they are known when a model is there, which chooses them."""
    larger: NDArray[np.uint8] | None = None
    """The same frames as the report draws them, where they differ, (F, H, W, 3) uint8 RGB."""
    info: VideoInfo | None = None
    """Of the file."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """`prepare`'s arguments about it: video, fps, max_frames."""
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
            warning = unread(self.question)
            if warning:
                self.notes.append(f"warning: {warning}")
            elif self.expected is None and self.name != DEMO:
                self.notes.append("the embedded model reads tiles drawn into a video; where there are none, it guesses")
            return model, self.notes
        from tokenreduce.models import load_model

        return load_model(self.model, **loading), self.notes

    def prepare(self, model: Any) -> Any:
        """Inputs for `model`; `clip` holds the frames afterwards."""
        from tokenreduce.models import look, prepare

        self.clip = self.clip or look(model, **self.sampling, info=self.info)
        # The embedded model spells numbers digit by digit: frame times would be a third of its input.
        times = self.model != EMBEDDED
        return prepare(model, self.clip, self.question, time_instruction=times)

    @property
    def shown(self) -> NDArray[np.uint8]:
        """The frames as the report draws them, (F, H, W, 3) uint8 RGB."""
        assert self.clip is not None, "drawn after `prepare`"
        return self.clip.array() if self.larger is None else self.larger

    def decoder(self, model: Any) -> Callable[[Any], str] | None:
        """Token ids to text, by the tokenizer in the checkpoint's folder."""
        from tokenreduce.models.tokenizer import has_tokenizer, read_tokenizer

        folder = Path(model.name_or_path)
        if not has_tokenizer(folder):
            return None
        tokenizer = read_tokenizer(folder, model.config.get_text_config())
        return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def read_question(
    video: str,
    question: str | None,
    model: str,
    fps: float | None = None,
    max_frames: int | None = None,
    allow_truncated: bool = False,
) -> Asking:
    """What is asked. Raises MediaError where the file cannot be read, or an argument makes no sense."""
    check_sampling(fps, max_frames)
    if question is not None and not question.strip():
        raise MediaError(f"the question is empty ({question!r}); leave it out to have the video described")
    if (
        video == DEMO and not Path(video).is_file()
    ):  # `make demo` leaves a folder of this name; ./demo is a folder of frames.
        return _demo(question, model)
    path = local_path(video)
    info = None if path.is_dir() else video_info(path, allow_truncated=allow_truncated)
    most = (EMBEDDED_FRAMES if model == EMBEDDED else MAX_FRAMES) if max_frames is None else max_frames
    sampling = {"video": path, "fps": fps, "max_frames": most}
    return Asking(path.stem, question or DEFAULT_QUESTION, model, info=info, sampling=sampling)


def _demo(question: str | None, model: str) -> Asking:
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
    return Asking(DEMO, question or example.question, model, clip, larger.frames, expected=expected)
