"""Qwen3-VL."""

from __future__ import annotations

import torch

from tokenreduce.adapter import Prompt
from tokenreduce_adapters._runs import Medium, Places, image_places, runs
from tokenreduce_adapters.qwen2_vl import Qwen2VLAdapter


class Qwen3VLAdapter(Qwen2VLAdapter):
    """As Qwen2-VL, but every frame stands between a start and an end token of its own, with its time as text before it.

    So a frame is a run of video ids, and how many runs a video has follows from the number of its features.
    The time texts between frames are marked as timestamps, and stay; the one before the first frame is ordinary text.
    Deepstack adds a row to every vision token after each of the first layers; a merged token gets the mean of the rows
    of its group, weighted as its hidden state is, so that merging before or after the addition gives the same result.
    """

    name = "qwen3_vl"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    checkpoints = (
        "Qwen/Qwen3-VL-2B-Instruct",
        "Qwen/Qwen3-VL-4B-Instruct",
        "Qwen/Qwen3-VL-8B-Instruct",
        "Qwen/Qwen3-VL-32B-Instruct",
        "Qwen/Qwen3-VL-30B-A3B-Instruct",
    )
    deepstack = ("visual_pos_masks", "deepstack_visual_embeds")
    notes = "timestamps between frames stay; deepstack rows are merged with the tokens they belong to"

    def frames(self, prompt: Prompt, medium: Medium) -> Places:
        if medium.kind == "image":
            return image_places(medium)
        frames = [len(run) for run in runs(medium.columns)]
        device = medium.columns.device
        slot = torch.cat([torch.arange(n, device=device) for n in frames])
        frame = torch.cat([torch.full((n,), number, device=device) for number, n in enumerate(frames)])
        return Places(slot, frame)
