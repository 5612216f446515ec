"""The embedded model: LLaVA-Video's shape with two million parameters, and its weights, which ship inside the package.

48×48 pixels make 6×6 patches; with a newline after each row a frame has 42 tokens, and 32 frames have 1,344. The decoder is a
Qwen2 of 12 layers. docs/testbed.md is the model card.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig

from tokenreduce.models import load_model
from tokenreduce.models.llava_video.modeling import LlavaVideoConfig, LlavaVideoForConditionalGeneration
from tokenreduce.models.loading import EMBEDDED as EMBEDDED
from tokenreduce.models.loading import EMBEDDED_FOLDER
from tokenreduce.testbed.glyphs import COLOURS, DIGITS
from tokenreduce.testbed.questions import EXAMPLE, is_read

ABOUT = (
    "the embedded model (2.2 million parameters) finds numbered tiles hidden in a video and knows no other thing; it reads "
    f"questions such as {EXAMPLE!r}"
)
"""What it is, for whoever did not choose it."""
WEIGHTS = EMBEDDED_FOLDER
"""Its checkpoint folder."""
FRAME_SIDE, GRID, MAX_FRAMES = 48, 6, 32
"""Pixels per side of a frame, patches per side, and the longest video it was made for."""
PAD, START, END, IMAGE, VIDEO, UNKNOWN = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<unk>"

_TEXT = """
system You are a helpful assistant . user
The video lasts for seconds , and frames are uniformly sampled from it . These frames are located at
Please answer the following questions related to this video .
Which digit is on the tile ? Which colour is the spot on tile , and which digit is on the tile of that colour ?
of the colour that the spot on the tile has How many tiles carry a digit ? Which tile comes first , or ?
List the tiles and their digits in order of appearance . every frame shown last before after left right top bottom
Answer with one word What happens in this video ? Describe the video . yes no s
"""


def unread(question: str) -> str:
    """A warning where the embedded model cannot read `question`, "" where it can."""
    if is_read(question):
        return ""
    return (
        f"{question!r} is not a question that the embedded model can read, and its answer means nothing: {ABOUT}; ask another "
        "model with --model"
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer: one token per word of the task, digit and sign; other words are spelled letter by letter."""
    letters = [chr(code) for code in range(33, 127)]
    words = sorted({*_TEXT.split(), *COLOURS, *DIGITS} - set(letters))
    special = [PAD, START, END, IMAGE, VIDEO, UNKNOWN]
    spelling = [f"##{letter}" for letter in string.ascii_letters + "_"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters, *words, *spelling])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated"), pre_tokenizers.Digits(True)]
    )
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START, IMAGE, VIDEO],
        clean_up_tokenization_spaces=False,
    )


def read_saved_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer saved in `folder`, as it stands."""
    return PreTrainedTokenizerFast.from_pretrained(folder)  # type: ignore[no-any-return]


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaVideoConfig:
    """The shape of the embedded model."""
    text = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )
    vision = SiglipVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=FRAME_SIDE,
        patch_size=FRAME_SIDE // GRID,
        vision_use_head=False,
    )
    return LlavaVideoConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        video_token_index=tokenizer.convert_tokens_to_ids(VIDEO),
        vision_feature_layer=-1,
        image_grid_pinpoints=[[FRAME_SIDE, FRAME_SIDE]],
        pool_stride=1,
        context_length=4096,
    )


def build_model(seed: int = 0) -> PreTrainedModel:
    """The embedded model with random weights that depend on `seed` alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaVideoForConditionalGeneration(build_config(build_tokenizer())).eval()  # type: ignore[no-any-return]


def load_embedded(**placement: Any) -> PreTrainedModel:
    """The embedded model in eval mode, through `load_model`. placement: `load_model`'s device, dtype and attention.

    `model.is_trained` is False where the package holds no weights (an untrained checkout); the weights are random then.
    """
    trained = (WEIGHTS / "model.safetensors").is_file()
    model = load_model(WEIGHTS, **placement) if trained else build_model()
    model.is_trained = trained
    if not trained:
        model.name_or_path = str(WEIGHTS)
        if not (WEIGHTS / "tokenizer.json").is_file():
            build_tokenizer().save_pretrained(WEIGHTS)
    return model
