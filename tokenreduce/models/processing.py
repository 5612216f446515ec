"""One call that turns a video and a question into a model's inputs, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, BatchFeature, PreTrainedModel

from tokenreduce.errors import CheckpointError, MediaError, UnsupportedError, foreign
from tokenreduce.media.video import VideoClip, VideoInfo, sample_indices
from tokenreduce.models.checkpoint import message_of
from tokenreduce.models.loading import family_of
from tokenreduce.models.placement import input_device
from tokenreduce.models.request import Video, VideoQuestion


def prepare(
    model: PreTrainedModel,
    video: Video | Sequence[Video],
    question: str | Sequence[str],
    *,
    frame_times: Sequence[Any] | None = None,
    duration: Any = None,
    time_instruction: bool = True,
    max_slice_nums: int | None = None,
    use_image_id: bool | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    force_sample: bool | None = None,
    allow_truncated: bool = False,
    processor: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> BatchFeature:
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`, made as the model's authors make them.

    Args:
        model: from `load_model`; its family decides on prompt, sampling and pre-processing.
        video: path or file:// URL of a video file; a folder of frame files or a list of them, taken in the order of their
            numbers; or frames already sampled: uint8 RGB (F, H, W, 3), or a list of (H, W, 3) or (f, H, W, 3) arrays, where
            sizes may differ, or of PIL images; or what `look` returned. With a list of questions, a list of as many videos.
        question: what to ask; or a list, for a batch that is padded on the left.
        frame_times: seconds, ascending, one per frame of an array. Without them an array counts as sampled at `fps`. For a
            batch, a list per video.
        duration: seconds, length of the video an array was taken from. For a batch, one per video.
        time_instruction: tell the model the duration and the time of each frame, where its prompt has a place for it.
        max_slice_nums: MiniCPM-V: slices per frame, at most.
        use_image_id: MiniCPM-V: number the frames.
        fps: frames per second to sample from a file, by default 1; frame files and arrays count as sampled at it.
        max_frames: at most so many frames, of a file by default 64.
        force_sample: always spread `max_frames` over the file; by default the model's own rule.
        allow_truncated: warn, and go on with what is there, where a file broke off.
        processor: tokenizer or processor to use instead of the one in the model's checkpoint folder.
        progress: called with (frames decoded, frames wanted), for each video.

    Returns:
        BatchFeature of tensors on the model's device, pixel values in its dtype.

    Raises:
        MediaError: the video cannot be read, the frames are not uint8 RGB, or an argument makes no sense.
        CheckpointError: the model's folder holds no tokenizer.
        UnsupportedError: the family's own processor needs a package that is not installed.
    """
    batched = isinstance(question, Sequence) and not isinstance(question, str)
    requests = [
        VideoQuestion(
            video=each,
            question=asked,
            frame_times=times,
            duration=seconds,
            time_instruction=time_instruction,
            max_slice_nums=max_slice_nums,
            use_image_id=use_image_id,
            fps=fps,
            max_frames=max_frames,
            force_sample=force_sample,
            allow_truncated=allow_truncated,
            progress=progress,
        )
        for each, asked, times, seconds in (
            _batch(video, question, frame_times, duration) if batched else [(video, question, frame_times, duration)]
        )
    ]
    family = family_of(model)
    if family is None:
        inputs = _prepare_with_transformers(model, requests, processor, batched)
    else:
        processor = processor or family.processor(_folder(model))
        parts = [family.prepare(model, request, processor) for request in requests]
        inputs = family.batch(parts, processor) if batched else parts[0]
    return inputs.to(input_device(model), dtype=model.dtype)


def look(
    model: PreTrainedModel,
    video: Video,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    force_sample: bool | None = None,
    allow_truncated: bool = False,
    info: VideoInfo | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> VideoClip:
    """The frames of one video that `prepare` shows the model, with their times.

    info: of the file, from `video_info`, if there already. Other arguments, and errors, as for `prepare`.
    """
    request = VideoQuestion(
        video=video,
        question="?",
        fps=fps,
        max_frames=max_frames,
        force_sample=force_sample,
        allow_truncated=allow_truncated,
        info=info,
        progress=progress,
    )
    family = family_of(model)
    return request.clip(sample_indices) if family is None else family.look(model, request)


def _batch(videos: Any, questions: Sequence[Any], *options: Any) -> list[tuple[Any, ...]]:
    """(video, question, frame_times, duration) of each row; MediaError where their numbers differ."""
    count, listed = len(questions), isinstance(videos, list | tuple) or getattr(videos, "ndim", 0) == 5
    if not count:
        raise MediaError("the list of questions is empty")
    if not listed or len(videos) != count:
        got = f"{len(videos)}" if listed else "one that is no list"
        raise MediaError(f"a list of {count} questions needs a list of as many videos, got {got}")
    rows = [videos, questions]
    for name, values in zip(("frame_times", "duration"), options, strict=True):
        if values is not None and (not isinstance(values, Sequence) or len(values) != count):
            raise MediaError(f"{name} must have one entry for each of the {count} videos, got {values!r}")
        rows.append([None] * count if values is None else values)
    return list(zip(*rows, strict=True))


def _folder(model: PreTrainedModel) -> Path:
    name = model.name_or_path
    if not name:
        raise CheckpointError(f"{type(model).__name__} was not loaded from a folder; give prepare(processor=…)")
    return Path(name)


def _prepare_with_transformers(
    model: PreTrainedModel, requests: Sequence[VideoQuestion], processor: Any, batched: bool
) -> BatchFeature:
    """Inputs from the family's own Hugging Face processor; frames are images where it has no notion of video."""
    processor = processor or _hf_processor(model)
    knows_video = getattr(processor, "video_processor", None) is not None
    messages, told = [], []
    for request in requests:
        clip = request.clip(sample_indices)
        if knows_video:
            content: list[dict[str, Any]] = [{"type": "video", "video": clip.array()}]
            told.append(video_metadata(clip))
        else:
            content = [{"type": "image", "image": frame} for frame in clip.images()]
        messages.append([{"role": "user", "content": [*content, {"type": "text", "text": request.question}]}])
    extra: dict[str, Any] = {"do_sample_frames": False, "video_metadata": told} if knows_video else {}
    if batched:
        processor.tokenizer.padding_side = "left"
        extra["padding"] = True
    with foreign(CheckpointError, f"{model.name_or_path}: its processor cannot make inputs of this"):
        inputs = processor.apply_chat_template(
            messages if batched else messages[0],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **extra,
        )
    return BatchFeature(dict(inputs))


def video_metadata(clip: VideoClip) -> dict[str, Any]:
    """What transformers' processors read times from: the number of each frame, divided by frames per second.

    Where that would not be its time, as with a variable frame rate, frames are numbered by milliseconds.
    """
    numbers, rate, total = list(clip.indices), clip.fps, clip.total or len(clip.indices)
    if any(abs(number / rate - time) > 0.5 / rate for number, time in zip(numbers, clip.times, strict=True)):
        numbers, rate = [round(time * 1000) for time in clip.times], 1000.0
        total = max(round(clip.duration * rate), numbers[-1] + 1)
    return {"fps": rate, "duration": clip.duration, "total_num_frames": total, "frames_indices": numbers}


def _hf_processor(model: PreTrainedModel) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(model.name_or_path, trust_remote_code=False)
    except ImportError as error:
        raise UnsupportedError(
            f"{type(model).__name__}: its Hugging Face processor needs a package that is not installed "
            f"({message_of(error).split('. ')[0]}); install it, usually torchvision, or build the inputs by hand"
        ) from None
    except Exception as error:  # each processor class has its own kinds
        raise CheckpointError(
            f"{model.name_or_path}: no processor could be read ({message_of(error)}); give prepare(processor=…)"
        ) from error
    if not any(getattr(processor, part, None) is not None for part in ("image_processor", "video_processor")):
        raise UnsupportedError(
            f"{model.name_or_path}: {type(model).__name__} has no processor for pictures; give a video language model, or "
            "prepare(processor=…)"
        )
    return processor
