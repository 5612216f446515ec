"""Talking to a model: text of a second turn, and greedy decoding with each step timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenreduce.compare.clock import now
from tokenreduce.compare.prefill import is_finite, timed
from tokenreduce.errors import CheckpointError, UnsupportedError
from tokenreduce.models.loading import family_of
from tokenreduce.models.tokenizer import has_tokenizer, read_tokenizer

CHATML = "<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
MARK = "ANSWERMARK"


class Speaker:
    """Tokens to text and back for one model, and where an answer ends."""

    def __init__(self, model: Any) -> None:
        folder = Path(model.name_or_path)
        if has_tokenizer(folder):
            self.tokenizer = read_tokenizer(folder, model.config.get_text_config())
        else:
            raise CheckpointError(f"{folder}: no tokenizer in it, and a comparison has to read answers")
        self._native = family_of(model) is not None
        ends = model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def turn(self, answer: str, question: str) -> list[int]:
        """Ids that say `answer` in the model's place, end its turn and ask `question`."""
        text = answer + self._next_turn(question)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _next_turn(self, question: str) -> str:
        if not self._native and self.tokenizer.chat_template:
            return self._by_template(question)
        if self._native or "<|im_end|>" in self.tokenizer.get_vocab():
            return CHATML.format(question=question)
        raise UnsupportedError("this model's tokenizer has no chat template, so a second turn cannot be written")

    def _by_template(self, question: str) -> str:
        """What the chat template puts between an answer and the next one."""
        messages = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": MARK},
            {"role": "user", "content": question},
        ]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return text.rpartition(MARK)[2]


@dataclass
class Reply:
    """What one run through a conversation gave."""

    ids: list[int] = field(default_factory=list)
    """Token ids of the answer, its end token included."""
    logits: list[Tensor] = field(default_factory=list)
    """One (vocabulary,) float32 tensor per token of the answer."""
    vision: float = 0.0
    """Seconds of the vision tower, with everything else before the decoder."""
    prefill: float = 0.0
    """Seconds of the decoder in the prefill."""
    turn: float = 0.0
    """Seconds of the forwards of the later turns."""
    decode: list[float] = field(default_factory=list)
    """Seconds of each step after the first token."""

    @property
    def finite(self) -> bool:
        """Whether all logits are numbers; else the answer means nothing."""
        return all(is_finite(logits) for logits in self.logits)


@torch.inference_mode()
def converse(
    model: Any,
    decoder: nn.Module,
    inputs: Mapping[str, Any],
    turns: Sequence[Sequence[int]],
    ends: set[int],
    new_tokens: int,
    after_prefill: Callable[[Any], None] = lambda output: None,
) -> Reply:
    """Prefill with `inputs` (batch 1), go through `turns` (token ids) on the same cache, then answer greedily.

    after_prefill: called with the output of the prefill, untimed.
    """
    reply, device = Reply(), inputs["input_ids"].device
    with timed(decoder, device) as spans:
        started = now(device)
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        ended = now(device)
    reply.prefill = spans[0]
    reply.vision = ended - started - reply.prefill
    after_prefill(out)
    for ids in turns:
        started = now(device)
        out = _next(model, torch.tensor([list(ids)], device=device), out)
        reply.turn += now(device) - started
    while True:
        logits = out.logits[0, -1].float()
        reply.logits.append(logits)
        reply.ids.append(int(logits.argmax()))
        if reply.ids[-1] in ends or len(reply.ids) == new_tokens:
            return reply
        started = now(device)
        out = _next(model, torch.tensor([[reply.ids[-1]]], device=device), out)
        reply.decode.append(now(device) - started)


def _next(model: Any, ids: Tensor, out: Any) -> Any:
    return model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True, logits_to_keep=1)


def kl_divergence(reference: Reply, other: Reply) -> float:
    """Mean of KL(reference ‖ other), in nats, over the answer's tokens up to and with the first where the two differ.

    NaN where logits of one of them are not finite.
    """
    if not (reference.finite and other.finite):
        return math.nan
    values = []
    for number, (p, q) in enumerate(zip(reference.logits, other.logits, strict=False)):
        # Models may forbid a token with −∞.
        left, right = (logits.double().log_softmax(-1).clamp_min(-1e4) for logits in (p, q))
        values.append(float((left.exp() * (left - right)).sum()))
        if reference.ids[number] != other.ids[number]:
            break
    return max(0.0, sum(values) / len(values))
