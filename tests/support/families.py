"""Tiny random models of every vision family, made from their real config classes, and inputs made by hand.

A sample is a batch of rows; a row is a list of parts (`Text`, `Video`, `Image`). While a row is written, the layout
that belongs to it is written beside it, part by part, as the family's prompt format has it: no adapter is involved.

    family = FAMILIES["qwen2_vl"]
    model = family.model()
    sample = family.sample([[Text(3), Video(2), Text(4)], [Text(5)]])
    model(**sample.inputs); sample.layout
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from tokenreduce.layout import NEWLINE, PLAIN, TIMESTAMP, WRAPPER, TokenLayout

IMAGE, VIDEO, START, END, FAKE, GLOBAL, TILE = 100, 101, 102, 103, 104, 105, 106
"""Ids: placeholders of an image and a video, tags before and after, SmolVLM's tags (a tile's is TILE + its number)."""
BREAK, FRAME, COLON, INTRO, DIGIT = 80, 81, 82, 83, 90
"""Ids of frame labels: line break, `Frame`, `:`, a video's introduction, digits (from DIGIT on)."""
VOCABULARY = 120
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {**TOWER, "image_size": 24, "patch_size": 4}
PINPOINTS = [[24, 24], [24, 48], [48, 24], [48, 48]]
QWEN = {
    "depth": 2,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@dataclass(frozen=True)
class Text:
    """`n` random text tokens."""

    n: int


@dataclass(frozen=True)
class Video:
    """A video of `frames` frames. grid: rows and columns of tokens per frame, where frames can have any size."""

    frames: int
    grid: tuple[int, int] = (2, 3)


@dataclass(frozen=True)
class Image:
    """An image of `size` (height, width) pixels: (24, 24) is one tile, other sizes matter where a family cuts tiles."""

    size: tuple[int, int] = (24, 24)


Part = Text | Video | Image


@dataclass
class Row:
    """One row of a batch while it is written: ids, the layout beside them, and the pixels in order."""

    random: torch.Generator
    ids: list[int] = field(default_factory=list)
    slot: list[int] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)
    medium: list[int] = field(default_factory=list)
    marker: list[int] = field(default_factory=list)
    media: int = 0
    pixels: dict[str, list[Any]] = field(default_factory=dict)

    def text(self, ids: Sequence[int], marker: int = PLAIN) -> None:
        """Tokens that are not vision."""
        self.ids += ids
        self.marker += [marker] * len(ids)
        for facts in (self.slot, self.frame, self.medium):
            facts += [-1] * len(ids)

    def vision(self, token: int, slots: Sequence[int], frame: int, newlines: Sequence[int] = ()) -> None:
        """Tokens of the present medium; `newlines` are the slots that are newlines."""
        self.ids += [token] * len(slots)
        self.slot += slots
        self.frame += [frame] * len(slots)
        self.medium += [self.media] * len(slots)
        self.marker += [NEWLINE if slot in newlines else PLAIN for slot in slots]

    def give(self, **values: Any) -> None:
        """Pixels, sizes or grids that the model needs for what was written."""
        for name, value in values.items():
            self.pixels.setdefault(name, []).append(value)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def words(self, n: int) -> list[int]:
        """`n` random ids that stand for nothing special."""
        return torch.randint(10, 80, (n,), generator=self.random).tolist()


@dataclass(frozen=True)
class Sample:
    """inputs: keyword arguments of the model's forward and of generate(). layout: what belongs to them, (B, N)."""

    inputs: dict[str, Tensor]
    layout: TokenLayout


@dataclass(frozen=True)
class Family:
    """config: makes the tiny config. video, image: write a medium into a row. collate: makes inputs of the pixels."""

    name: str
    model_class: str
    config: Callable[[], Any]
    image: Callable[[Row, Image], None]
    video: Callable[[Row, Video], None] | None
    collate: Callable[[list[Row], Tensor], dict[str, Tensor]]
    same_length: bool = False
    """All videos of a batch must have the same number of frames."""

    def model(self, dtype: torch.dtype = torch.float32, seed: int = 0, attn: str = "sdpa") -> Any:
        """A random model in eval mode, on the CPU; the vision side is scaled up so that its features differ."""
        torch.manual_seed(seed)
        model = getattr(transformers, self.model_class)(self.config()).eval().to(dtype)
        model.set_attn_implementation(attn)
        text = ("language_model", "text_model", "lm_head")
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not any(part in name for part in text):
                torch.nn.init.normal_(parameter, std=0.2)
        model.generation_config.pad_token_id = 0
        return model

    def sample(self, rows: Sequence[Sequence[Part]], seed: int = 1, dtype: torch.dtype = torch.float32) -> Sample:
        """A left-padded batch of `rows`; pixel values are of `dtype`."""
        written = [self._row(parts, seed + i) for i, parts in enumerate(rows)]
        longest = max(len(row.ids) for row in written)

        def pad(name: str, value: int) -> Tensor:
            return torch.tensor([[value] * (longest - len(row.ids)) + getattr(row, name) for row in written])

        ids = pad("ids", 0)
        lengths = torch.tensor([[len(row.ids)] for row in written])
        inputs = {"input_ids": ids, "attention_mask": (torch.arange(longest) >= longest - lengths).long()}
        inputs |= {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.collate(written, ids).items()}
        facts = {name: pad(name, -1) for name in ("slot", "frame", "medium")}
        return Sample(inputs, TokenLayout(**facts, marker=pad("marker", PLAIN)))

    def mix(self, name: str) -> list[Part]:
        """One of MIXES, with its videos of equal length where the family needs that."""
        parts = MIXES[name]
        return [Video(3, p.grid) if self.same_length and isinstance(p, Video) else p for p in parts]

    def mixes(self) -> list[str]:
        """Names of the MIXES that the family can see."""
        return [n for n, parts in MIXES.items() if self.video or not any(isinstance(p, Video) for p in parts)]

    def _row(self, parts: Sequence[Part], seed: int) -> Row:
        row = Row(torch.Generator().manual_seed(seed))
        for part in parts:
            if isinstance(part, Text):
                row.text(row.words(part.n))
                continue
            if isinstance(part, Video):
                assert self.video is not None, f"{self.name} has no videos"
                self.video(row, part)
            else:
                self.image(row, part)
            row.media += 1
        return row


# ------------------------------------------------------------------------------------------------ LLaVA families

NEWLINES = {
    (24, 24): [36 + 7 * row + 6 for row in range(6)],  # fits one tile: 6 rows of 6
    (48, 24): [36 + 7 * row + 6 for row in range(12)],  # two tiles, one above the other: 12 rows of 6
    (40, 24): [36 + 7 * row + 6 for row in range(10)],  # the same, but the first and last of its 12 rows are padding
    (20, 48): [36 + 13 * row + 12 for row in range(6)],  # two tiles side by side: 6 rows of 12, one of padding kept
}
"""Newline slots of a tiled image, after 36 overview tokens, by image size."""


def tiled_image(row: Row, image: Image, newlines: dict[tuple[int, int], list[int]] = NEWLINES) -> None:
    """LLaVA-NeXT: overview and rows of tiles, a newline after each row."""
    where = newlines[image.size]
    row.vision(IMAGE, range(where[-1] + 1), 0, where)
    row.give(image_sizes=torch.tensor(image.size), pixel_values=row.noise(5, 3, 24, 24))


def onevision_image(row: Row, image: Image) -> None:
    """As LLaVA-NeXT, but scaled down above one tile and a half: 12 × 6 becomes 8 × 4, 10 × 6 becomes 7 × 4 …"""
    small = {(48, 24): (8, 4), (40, 24): (7, 4), (20, 48): (4, 8)}
    scaled = {size: [36 + (c + 1) * r + c for r in range(rows)] for size, (rows, c) in small.items()}
    tiled_image(row, image, NEWLINES | scaled)


def plain_image(row: Row, image: Image) -> None:
    row.vision(IMAGE, range(36), 0)
    row.give(pixel_values=row.noise(3, 24, 24))


def pooled_video(row: Row, video: Video) -> None:
    """LLaVA-NeXT-Video: 9 tokens per frame and nothing else."""
    for frame in range(video.frames):
        row.vision(VIDEO, range(9), frame)
    row.give(pixel_values_videos=row.noise(video.frames, 3, 24, 24))


def onevision_video(row: Row, video: Video) -> None:
    """As LLaVA-NeXT-Video, and one newline at the end."""
    pooled_video(row, video)
    row.vision(VIDEO, [9], video.frames - 1, [9])


def stacked(rows: list[Row], ids: Tensor) -> dict[str, Tensor]:
    names = dict.fromkeys(name for row in rows for name in row.pixels)
    return {name: torch.stack([value for row in rows for value in row.pixels.get(name, [])]) for name in names}


def clip_llava(name: str, **more: Any) -> Callable[[], Any]:
    tower = {"model_type": "clip_vision_model", "projection_dim": 32, **SQUARE}
    ids = {"image_token_index": IMAGE, "vision_feature_select_strategy": "default", "vision_feature_layer": -2}
    return lambda: getattr(transformers, name)(
        text_config={**TEXT, "model_type": "llama"}, vision_config=tower, **ids, **more
    )


def onevision_config() -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **SQUARE},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
    )


def pixtral_config() -> Any:
    tower = {"model_type": "pixtral", **SQUARE, "head_dim": 16, "image_size": 48}
    return transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "mistral", "head_dim": 16},
        vision_config=tower,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def pixtral_image(row: Row, image: Image) -> None:
    """One run of ids per row of patches, a break between rows, an end after the last."""
    rows, columns = image.size[0] // 4, image.size[1] // 4
    for r in range(rows):
        row.vision(IMAGE, range(r * columns, (r + 1) * columns), 0)
        row.text([END], PLAIN if r == rows - 1 else WRAPPER)
    row.give(pixel_values=row.noise(3, *image.size), image_sizes=torch.tensor(image.size))


def padded(rows: list[Row], ids: Tensor) -> dict[str, Tensor]:
    """Images of different sizes, zero below and to the right."""
    images = [value for row in rows for value in row.pixels.get("pixel_values", [])]
    if not images:
        return {}
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    grown = [torch.nn.functional.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
    sizes = [value for row in rows for value in row.pixels.get("image_sizes", [])]
    return {"pixel_values": torch.stack(grown), "image_sizes": torch.stack(sizes)}


# ------------------------------------------------------------------------------------------------- Qwen families


def qwen_config(config: str, tower: dict[str, Any], **text: Any) -> Callable[[], Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return lambda: getattr(transformers, config)(
        text_config={**TEXT, "rope_parameters": rope, **text},
        vision_config={**QWEN, **tower},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )


def qwen_image(row: Row, image: Image) -> None:
    rows, columns = image.size[0] // 8, image.size[1] // 8
    row.text([START], WRAPPER)
    row.vision(IMAGE, range(rows * columns), 0)
    row.text([END], WRAPPER)
    grid = torch.tensor([1, 2 * rows, 2 * columns])
    row.give(pixel_values=row.noise(int(grid.prod()), 96), image_grid_thw=grid)


def qwen_video(row: Row, video: Video) -> None:
    rows, columns = video.grid
    row.text([START], WRAPPER)
    for frame in range(video.frames):
        row.vision(VIDEO, range(rows * columns), frame)
    row.text([END], WRAPPER)
    grid = torch.tensor([video.frames, 2 * rows, 2 * columns])
    row.give(pixel_values_videos=row.noise(int(grid.prod()), 96), video_grid_thw=grid)


def qwen3_video(row: Row, video: Video) -> None:
    """Each frame between a start and an end of its own, after its time."""
    rows, columns = video.grid
    for frame in range(video.frames):
        row.text(label(frame), TIMESTAMP if frame else PLAIN)
        row.text([START], WRAPPER)
        row.vision(VIDEO, range(rows * columns), frame)
        row.text([END], WRAPPER)
    grid = torch.tensor([video.frames, 2 * rows, 2 * columns])
    row.give(pixel_values_videos=row.noise(int(grid.prod()), 96), video_grid_thw=grid)


def qwen_inputs(rows: list[Row], ids: Tensor) -> dict[str, Tensor]:
    names = dict.fromkeys(name for row in rows for name in row.pixels)
    values = {name: [v for row in rows for v in row.pixels.get(name, [])] for name in names}
    join = {name: torch.stack(v) if name.endswith("thw") else torch.cat(v) for name, v in values.items()}
    return join | {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}


# --------------------------------------------------------------------------------- InternVL and SmolVLM families


def label(number: int) -> list[int]:
    """`Frame<number>:`, one id per digit, counted from 1."""
    return [FRAME, *(DIGIT + int(digit) for digit in str(number + 1)), COLON]


def internvl_config() -> Any:
    return transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**TOWER, "image_size": [24, 24], "patch_size": [4, 4]},
        image_token_id=IMAGE,
        image_seq_length=9,
    )


def internvl_image(row: Row, image: Image) -> None:
    """Tiles and a thumbnail in one run; one tile where the image is no larger."""
    tiles = image.size[0] * image.size[1] // 576
    tiles += tiles > 1
    row.text([START], WRAPPER)
    row.vision(IMAGE, range(9 * tiles), 0)
    row.text([END], WRAPPER)
    row.give(pixel_values=row.noise(tiles, 3, 24, 24))


def internvl_video(row: Row, video: Video) -> None:
    for frame in range(video.frames):
        row.text([BREAK, *label(frame)] if frame else label(frame), TIMESTAMP if frame else PLAIN)
        row.text([START], WRAPPER)
        row.vision(IMAGE, range(9), frame)
        row.text([END], WRAPPER)
    row.give(pixel_values=row.noise(video.frames, 3, 24, 24))


def tiles_in_a_row(rows: list[Row], ids: Tensor) -> dict[str, Tensor]:
    tiles = [value for row in rows for value in row.pixels.get("pixel_values", [])]
    return {"pixel_values": torch.cat(tiles)} if tiles else {}


def smolvlm_config() -> Any:
    return transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config=SQUARE, image_token_id=IMAGE, scale_factor=2
    )


def smolvlm_image(row: Row, image: Image) -> None:
    """Tiles with a tag each, a line break after every row of them, then the global view."""
    rows, columns = image.size[0] // 24, image.size[1] // 24
    count = 0
    if (rows, columns) != (1, 1):
        for _ in range(rows):
            for _ in range(columns):
                row.text([FAKE, TILE + count], WRAPPER)
                row.vision(IMAGE, range(9 * count, 9 * count + 9), 0)
                count += 1
            row.text([BREAK], WRAPPER)
        row.text([BREAK], WRAPPER)
    row.text([FAKE, GLOBAL], WRAPPER)
    row.vision(IMAGE, range(9 * count, 9 * count + 9), 0)
    row.text([FAKE], WRAPPER)
    row.give(pixel_values=row.noise(count + 1, 3, 24, 24))


def smolvlm_video(row: Row, video: Video) -> None:
    row.text([INTRO] * 20)
    for frame in range(video.frames):
        row.text([BREAK, *label(frame)], TIMESTAMP if frame else PLAIN)
        row.text([FAKE, GLOBAL], WRAPPER)
        row.vision(IMAGE, range(9), frame)
        row.text([FAKE], WRAPPER)
    row.text([BREAK])
    row.give(pixel_values=row.noise(video.frames, 3, 24, 24))


def smolvlm_inputs(rows: list[Row], ids: Tensor) -> dict[str, Tensor]:
    """(B, most pictures, 3, H, W), all zero where a row has fewer."""
    each = [torch.cat([torch.zeros(0, 3, 24, 24), *row.pixels.get("pixel_values", [])]) for row in rows]
    most = max(len(pictures) for pictures in each)
    grown = [torch.cat([pictures, torch.zeros(most - len(pictures), 3, 24, 24)]) for pictures in each]
    return {"pixel_values": torch.stack(grown)} if most else {}


# ----------------------------------------------------------------------------------------------------- the table

QWEN2_TOWER = {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
QWEN25_TOWER = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "window_size": 32}
QWEN3_TOWER = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64}
DEEP = {**QWEN3_TOWER, "depth": 4, "deepstack_visual_indexes": [0, 1, 2]}
MOE = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            "llava_onevision",
            "LlavaOnevisionForConditionalGeneration",
            onevision_config,
            onevision_image,
            onevision_video,
            stacked,
            same_length=True,
        ),
        Family(
            "llava_next_video",
            "LlavaNextVideoForConditionalGeneration",
            clip_llava("LlavaNextVideoConfig", video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS),
            tiled_image,
            pooled_video,
            stacked,
            same_length=True,
        ),
        Family(
            "llava_next",
            "LlavaNextForConditionalGeneration",
            clip_llava("LlavaNextConfig", image_grid_pinpoints=PINPOINTS),
            tiled_image,
            None,
            stacked,
        ),
        Family("llava", "LlavaForConditionalGeneration", clip_llava("LlavaConfig"), plain_image, None, stacked),
        Family("pixtral", "LlavaForConditionalGeneration", pixtral_config, pixtral_image, None, padded),
        Family(
            "qwen2_vl",
            "Qwen2VLForConditionalGeneration",
            qwen_config("Qwen2VLConfig", QWEN2_TOWER),
            qwen_image,
            qwen_video,
            qwen_inputs,
        ),
        Family(
            "qwen2_5_vl",
            "Qwen2_5_VLForConditionalGeneration",
            qwen_config("Qwen2_5_VLConfig", {**QWEN25_TOWER, "fullatt_block_indexes": [1], "tokens_per_second": 2}),
            qwen_image,
            qwen_video,
            qwen_inputs,
        ),
        Family(
            "qwen3_vl",
            "Qwen3VLForConditionalGeneration",
            qwen_config("Qwen3VLConfig", DEEP, head_dim=16),
            qwen_image,
            qwen3_video,
            qwen_inputs,
        ),
        Family(
            "qwen3_vl_moe",
            "Qwen3VLMoeForConditionalGeneration",
            qwen_config("Qwen3VLMoeConfig", DEEP, **MOE),
            qwen_image,
            qwen3_video,
            qwen_inputs,
        ),
        Family(
            "internvl",
            "InternVLForConditionalGeneration",
            internvl_config,
            internvl_image,
            internvl_video,
            tiles_in_a_row,
        ),
        Family(
            "smolvlm",
            "SmolVLMForConditionalGeneration",
            smolvlm_config,
            smolvlm_image,
            smolvlm_video,
            smolvlm_inputs,
        ),
    )
}

MIXES: dict[str, list[Part]] = {
    "text": [Text(6)],
    "video": [Text(5), Video(3), Text(7)],
    "video_first": [Video(2), Text(4)],
    "long_video": [Text(2), Video(12, (1, 2)), Text(2)],
    "one_frame": [Text(2), Video(1), Text(2)],
    "two_videos": [Text(3), Video(2), Text(4), Video(4, (3, 2)), Text(5)],
    "videos_touching": [Text(3), Video(2), Video(2), Text(4)],
    "image": [Text(4), Image(), Text(5)],
    "two_images": [Text(4), Image((48, 24)), Text(2), Image((24, 24)), Text(5)],
    "images_touching": [Text(4), Image((48, 24)), Image((48, 24)), Text(5)],
    "video_image": [Text(4), Video(3), Text(3), Image((48, 24)), Text(5)],
    "image_video": [Text(4), Image((48, 24)), Text(3), Video(3), Text(5)],
    "video_small_image": [Text(4), Video(3), Text(3), Image(), Text(5)],
    "small_image_video": [Text(4), Image(), Text(3), Video(3), Text(5)],
    "touching": [Image(), Video(2), Image((48, 24)), Text(2)],
}
"""Rows that every family which can see their parts must lay out."""
