"""The embedded model's forward for batches of equal length, with the logits of the answers alone."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lab.training.lessons import QUIET, Batch


def patch_features(model: PreTrainedModel, frames: Tensor) -> Tensor:
    """(n, H, W, 3) uint8 frames to (n, patches, D) projected features, before the newlines."""
    pixels = (frames.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    return model.model.multi_modal_projector(hidden)  # type: ignore[no-any-return]


def answer_logits(model: PreTrainedModel, batch: Batch, *, frozen: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Logits where `batch` has labels: (B, A, vocabulary), with the labels (B, A) and the turns (A,).

    frozen: the encoder and projector get no gradient.
    """
    videos = len(batch.frames)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        patches = patch_features(model, batch.frames.flatten(0, 1))
    vision = model.model.apply_pooling(patches).reshape(videos, -1, patches.shape[-1])
    embedded = model.get_input_embeddings()(batch.ids)
    start = int((batch.ids[0] == model.config.video_token_id).nonzero()[0])
    inputs = torch.cat([embedded[:, :start], vision, embedded[:, start + vision.shape[1] :]], dim=1)
    hidden = model.model.language_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
    asked = (batch.turn != QUIET).nonzero()[:, 0]
    return model.lm_head(hidden[:, asked]), batch.labels[:, asked], batch.turn[asked]
