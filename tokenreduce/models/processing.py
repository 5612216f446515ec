"""One call that turns a video and a question into a model's inputs, whatever the family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, BatchFeature, PreTrainedModel

from tokenreduce.errors import CheckpointError, UnsupportedError, foreign
from tokenreduce.media.video import FPS, MAX_FRAMES, sample_indices
from tokenreduce.models.checkpoint import message_of
from tokenreduce.models.loading import family_of
from tokenreduce.models.placement import input_device
from tokenreduce.models.request import Video, VideoQuestion


def prepare(
    model: PreTrainedModel,
    video: Video,
    question: str,
    *,
    frame_times: Sequence[float] | None = None,
    duration: float | None = None,
    time_instruction: bool = True,
    max_slice_nums: int | None = None,
    use_image_id: bool | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
    force_sample: bool | None = None,
    processor: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> BatchFeature:
    """Inputs for `model(**inputs)` and `model.generate(**inputs)`, made as the model's authors make them.

    Args:
        model: from `load_model`; its family decides on prompt, sampling and pre-processing.
        video: path of a video file; or frames already sampled, uint8 RGB (F, H, W, 3), or a list of (H, W, 3) or
            (f, H, W, 3) arrays where sizes differ.
        question: what to ask.
        frame_times: seconds, one per frame of an array. Without them an array counts as sampled at `fps`.
        duration: seconds, length of the video an array was taken from.
        time_instruction: tell the model the duration and the time of each frame, where its prompt has a place for it.
        max_slice_nums: MiniCPM-V: slices per frame, at most.
        use_image_id: MiniCPM-V: number the frames.
        fps: frames per second to sample from a file; by default 1.
        max_frames: at most so many frames of a file; by default 64.
        force_sample: always spread `max_frames` over the file; by default the model's own rule.
        processor: tokenizer or processor to use instead of the one in the model's checkpoint folder.
        progress: called with (frames decoded, frames wanted).

    Returns:
        BatchFeature of tensors on the model's device, pixel values in its dtype.

    Raises:
        MediaError: the video cannot be read, or the frames are not uint8 RGB.
        CheckpointError: the model's folder holds no tokenizer.
        UnsupportedError: the family's own processor needs a package that is not installed.
    """
    request = VideoQuestion(
        video=video,
        question=question,
        frame_times=frame_times,
        duration=duration,
        time_instruction=time_instruction,
        max_slice_nums=max_slice_nums,
        use_image_id=use_image_id,
        fps=fps,
        max_frames=max_frames,
        force_sample=force_sample,
        progress=progress,
    )
    family = family_of(model)
    if family is None:
        inputs = _prepare_with_transformers(model, request, processor)
    else:
        inputs = family.prepare(model, request, processor or family.processor(_folder(model)))
    return inputs.to(input_device(model), dtype=model.dtype)


def _folder(model: PreTrainedModel) -> Path:
    name = model.name_or_path
    if not name:
        raise CheckpointError(f"{type(model).__name__} was not loaded from a folder; give prepare(processor=…)")
    return Path(name)


def _prepare_with_transformers(model: PreTrainedModel, request: VideoQuestion, processor: Any) -> BatchFeature:
    """Inputs from the family's own Hugging Face processor; frames are images where it has no notion of video."""
    processor = processor or _hf_processor(model)
    clip = request.clip(
        lambda info: sample_indices(
            info.frames, info.fps, request.fps or FPS, request.max_frames or MAX_FRAMES, bool(request.force_sample)
        )
    )
    if getattr(processor, "video_processor", None) is None:
        content = [{"type": "image", "image": frame} for frame in clip.images()]
        extra: dict[str, Any] = {}
    else:
        content = [{"type": "video", "video": clip.array()}]
        metadata = {
            "fps": clip.fps,
            "duration": clip.duration,
            "total_num_frames": clip.total or len(clip.indices),
            "frames_indices": clip.indices,
        }
        extra = {"do_sample_frames": False, "video_metadata": [metadata]}
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": request.question}]}]
    with foreign(CheckpointError, f"{model.name_or_path}: its processor cannot make inputs of this"):
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **extra
        )
    return BatchFeature(dict(inputs))


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
