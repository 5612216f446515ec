"""The tokenizer of a checkpoint folder, without the code of the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from tokenreduce.config.json_source import shown
from tokenreduce.errors import CheckpointError, foreign
from tokenreduce.models.checkpoint import read_json

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def read_tokenizer(folder: Path, config: PretrainedConfig) -> Any:
    """The tokenizer of a checkpoint folder; `config`: of the language model inside, as the folder's may be foreign."""
    remedy = "copy the tokenizer files of the checkpoint there, or give prepare(processor=…)"
    if not has_tokenizer(folder):  # transformers would make an empty tokenizer without a word
        raise CheckpointError(f"{folder}: no tokenizer in it ({', '.join(TOKENIZER_FILES)}); {remedy}")
    generic = _is_generic(folder)
    try:
        with foreign(CheckpointError, f"{shown(folder)}: its tokenizer cannot be read"):
            if generic:
                # Given a model type, AutoTokenizer would put that family's pre-tokenizer in place of the folder's own.
                return PreTrainedTokenizerFast.from_pretrained(folder)
            return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {remedy}") from error.__cause__


def _is_generic(folder: Path) -> bool:
    """Whether the folder's tokenizer.json is complete in itself, of no model family."""
    file = folder / "tokenizer_config.json"
    kind = read_json(file).get("tokenizer_class") if file.is_file() else None
    return kind in ("TokenizersBackend", "PreTrainedTokenizerFast") and (folder / "tokenizer.json").is_file()
