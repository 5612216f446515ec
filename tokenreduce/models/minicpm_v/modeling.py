"""MiniCPM-V 2.6 without remote code: SigLIP at any aspect ratio, a resampler of 64 queries, Qwen2.

The modules keep upstream's names, so its checkpoints load key by key and `save_pretrained` writes them back so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig

from tokenreduce.errors import LayoutError
from tokenreduce.models.minicpm_v.vision import NavitSiglip, Resampler

VISION_BATCH = 16
"""Pictures that pass the vision tower at once, as upstream."""


class MiniCPMVConfig(PreTrainedConfig):  # type: ignore[misc]
    """Config of the native model."""

    model_type = "minicpmv2_6"
    sub_configs = {"vision_config": Idefics2VisionConfig, "text_config": Qwen2Config}  # noqa: RUF012

    vision_config: Any = None
    """Idefics2VisionConfig of the tower."""
    text_config: Any = None
    """Qwen2Config of the decoder."""
    query_num: int = 64
    """Tokens per picture."""
    scale_resolution: int = 448
    """Side, in pixels, of the square whose area each picture is given."""
    image_token_id: int = 128244
    """<unk>, which stands for one query of a picture."""
    image_start_token_id: int = 151646
    """<image>, before an overview."""
    image_end_token_id: int = 151647
    """</image>, after it."""
    slice_start_token_id: int = 151656
    """<slice>, before a slice."""
    slice_end_token_id: int = 151657
    """</slice>, after it."""
    image_id_start_token_id: int = 151658
    """<image_id>, before the number of a frame."""
    image_id_end_token_id: int = 151659
    """</image_id>, after it."""
    newline_token_id: int = 198
    """Newline between the rows of slices."""
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, config_class in (("vision_config", Idefics2VisionConfig), ("text_config", Qwen2Config)):
            value = getattr(self, name)
            if not isinstance(value, PreTrainedConfig):
                setattr(self, name, config_class(**(value or {})))
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        super().__post_init__(**kwargs)


class MiniCPMVForConditionalGeneration(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """MiniCPM-V 2.6.

    A batch is B rows of token ids. pixel_values[b] (S, 3, P, L) are the pictures of row b, overview and slices of each
    frame, in the order of their places in the ids, with their patches side by side and zeros behind; tgt_sizes[b]
    (S, 2) long are their patch rows and columns, (0, 0) for no picture. A place in the ids is an opening tag,
    `query_num` <unk> and the closing tag.
    """

    config_class = MiniCPMVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Qwen2DecoderLayer", "Idefics2EncoderLayer", "Resampler"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        self.llm = Qwen2ForCausalLM(config.text_config)
        self.vpm = NavitSiglip(config.vision_config)
        self.resampler = Resampler(config.query_num, config.text_config.hidden_size, config.vision_config.hidden_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            nn.init.trunc_normal_(module.query, std=0.02)
            nn.init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)

    @property
    def language_model(self) -> Qwen2ForCausalLM:
        """The decoder with its head, under the name other families use."""
        return self.llm

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.llm.get_input_embeddings()  # type: ignore[no-any-return]

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.llm.lm_head  # type: ignore[no-any-return]

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's head."""
        self.llm.lm_head = value

    def picture_places(self, input_ids: Tensor) -> Tensor:
        """(B, N) bool: the <unk> of complete places. A stray <unk> or tag in a question is text."""
        config, queries = self.config, self.config.query_num
        if input_ids.shape[1] < queries + 2:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        inner = (input_ids[:, 1:-1] == config.image_token_id).unfold(1, queries, 1).all(-1)
        opens, closes = input_ids[:, : -queries - 1], input_ids[:, queries + 1 :]
        overview = (opens == config.image_start_token_id) & (closes == config.image_end_token_id)
        slice_ = (opens == config.slice_start_token_id) & (closes == config.slice_end_token_id)
        begun = nn.functional.pad((overview | slice_) & inner, (1, queries)).cumsum(1)
        ended = nn.functional.pad(begun, (queries, 0))[:, :-queries]
        return begun > ended

    def encode_pictures(self, pixel_values: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Pictures (n, 3, P, L) of `sizes` (rows, columns) in patches to (n, queries, D)."""
        patch, queries = self.config.vision_config.patch_size, self.config.query_num
        width = self.config.text_config.hidden_size
        out = torch.empty(len(sizes), queries, width, dtype=self.dtype, device=pixel_values.device)
        for rows, columns in dict.fromkeys(sizes):
            members = [i for i, size in enumerate(sizes) if size == (rows, columns)]
            for chunk in torch.tensor(members, device=out.device).split(VISION_BATCH):
                packed = pixel_values[chunk, ..., : rows * columns * patch].to(self.dtype)
                patches = packed.unflatten(-1, (rows, columns, patch)).permute(0, 1, 3, 2, 4, 5)
                pictures = patches.reshape(len(chunk), 3, rows * patch, columns * patch)
                hidden = self.vpm(pixel_values=pictures).last_hidden_state
                out = out.index_copy(0, chunk, self.resampler(hidden, rows, columns).to(out))
        return out

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        tgt_sizes: Tensor | None = None,
        *,
        cached: bool = False,
    ) -> Tensor:
        """(B, N, D): token embeddings with the pictures in their places.

        `pixel_values` may have fewer rows than `input_ids`: each then serves as many rows in turn (beams). `cached`
        says that earlier places are in the KV cache, so that only the last pictures of a row are still to be placed.

        Raises:
            LayoutError: the places in the ids and the pictures differ in number.
        """
        embeds: Tensor = self.get_input_embeddings()(input_ids)
        queries = self.config.query_num
        if input_ids.shape[1] < queries + 2 and (cached or pixel_values is None):
            return embeds  # a decode step: no place fits, and looking for one would wait for the device
        places = self.picture_places(input_ids)
        needed = (places.sum(1) // queries).tolist()
        if pixel_values is None or tgt_sizes is None:
            if any(needed):
                raise LayoutError(
                    f"input_ids have places for {sum(needed)} pictures; pass pixel_values and tgt_sizes of prepare()"
                )
            return embeds
        chosen = _match_pictures(needed, tgt_sizes.tolist(), cached)
        if not chosen:
            return embeds
        unique = list(dict.fromkeys(chosen))
        rows = torch.tensor([picture.row for picture in unique], device=pixel_values.device)
        columns = torch.tensor([picture.column for picture in unique], device=pixel_values.device)
        features = self.encode_pictures(pixel_values[rows, columns], [picture.size for picture in unique])
        index = {picture: i for i, picture in enumerate(unique)}
        features = features[[index[picture] for picture in chosen]].to(embeds)
        return embeds.masked_scatter(places[..., None], features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        tgt_sizes: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """One forward of the decoder. `kwargs` (labels, use_cache, logits_to_keep …) go to `Qwen2ForCausalLM`."""
        if inputs_embeds is None:
            if input_ids is None:
                raise LayoutError("neither input_ids nor inputs_embeds were given")
            cached = past_key_values is not None and past_key_values.get_seq_length() > 0
            inputs_embeds = self.embed(input_ids, pixel_values, tgt_sizes, cached=cached)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat everything per beam but the pictures, which `embed` shares between the beams of a row."""
        pictures = {key: kwargs.pop(key) for key in ("pixel_values", "tgt_sizes") if key in kwargs}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | pictures


class _Picture(NamedTuple):
    """Where a picture is in pixel_values."""

    row: int
    """Row of the batch."""
    column: int
    """Place among the pictures of that row."""
    size: tuple[int, int]
    """Patch rows and columns."""


def _match_pictures(needed: Sequence[int], sizes: Sequence[Sequence[Sequence[int]]], cached: bool) -> list[_Picture]:
    """The picture of each place, row by row, where row b of the ids has `needed[b]` places; see `embed`."""
    if len(needed) % len(sizes):
        raise LayoutError(
            f"input_ids have {len(needed)} rows, pixel_values {len(sizes)}; give one row of pictures per prompt"
        )
    repeats = len(needed) // len(sizes)
    chosen: list[_Picture] = []
    for index, count in enumerate(needed):
        row = index // repeats
        present = [_Picture(row, i, (h, w)) for i, (h, w) in enumerate(sizes[row]) if h * w]
        if len(present) < count or (len(present) > count and not cached):
            raise LayoutError(
                f"row {index} of input_ids has places for {count} pictures, pixel_values hold {len(present)}"
            )
        chosen += present[len(present) - count :]
    return chosen


AutoConfig.register(MiniCPMVConfig.model_type, MiniCPMVConfig, exist_ok=True)
AutoModelForImageTextToText.register(MiniCPMVConfig, MiniCPMVForConditionalGeneration, exist_ok=True)
