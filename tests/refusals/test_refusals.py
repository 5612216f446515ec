"""What is not supported is refused by name before the decoder runs, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support.families import FAMILIES, TEXT, Text, Video
from support.tiny import (
    BEFORE,
    SHARE,
    TOKENS,
    assert_same,
    causal,
    forward,
    generate,
    hooks,
    layout,
    logits,
    prompt,
    refused,
    snapshot,
    tiny_model,
)

import tokenreduce as tr
from tokenreduce.errors import (
    UnsupportedError,
)

# Chunked prefill with a family's own layout -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_vl"])
def test_chunked_prefill_of_a_family(name: str) -> None:
    """Refused where generate() encodes the video first and hands on pieces of it."""
    family = FAMILIES[name]
    model = family.model()
    sample = family.sample([[Text(3), Video(3), Text(4)]])
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}
    before = snapshot(model)
    with tr.reduce(model, "random", budget=SHARE) as run:
        with pytest.raises(UnsupportedError, match=r"chunked prefill.*prefill_chunk_size.*with tr.stream"):
            model.generate(**sample.inputs, prefill_chunk_size=8, **options)
        model.generate(**sample.inputs, **options)
        assert run.trace.tokens.tolist() == [sample.inputs["input_ids"].shape[1]]
    assert_same(model, before)


def test_a_chunk_of_the_length_of_the_layout() -> None:
    """Nothing in the call tells that it is a piece of a longer prompt. One chunk is the whole prompt, and is reduced."""
    ids = torch.cat([prompt(0), prompt(1)], 1)
    match = r"chunked prefill \(prefill_chunk_size\) is not supported"
    refused(tiny_model(), lambda model: generate(model, ids, prefill_chunk_size=TOKENS), match)
    model = tiny_model()
    with tr.reduce(model, "random", budget=SHARE, layout=layout()):
        expected = generate(model).sequences
        assert torch.equal(generate(model, prefill_chunk_size=TOKENS).sequences, expected)


# Masks ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (causal(), "a 4-D attention mask is not supported; pass the 2-D mask of padding"),
        ({"full_attention": causal()}, "a prepared dict of masks is not supported"),
        (torch.ones(1, TOKENS).index_fill(1, torch.arange(TOKENS - 3, TOKENS), 0), "right-padded batches"),
        (torch.ones(1, TOKENS).index_fill(1, torch.arange(8, 10), 0), "an attention mask with holes"),
    ],
    ids=["4d", "dict", "right", "holes"],
)
def test_masks(mask: Any, match: str) -> None:
    refused(tiny_model(), lambda model: forward(model, attention_mask=mask), match)


def test_a_prepared_mask_of_a_family() -> None:
    """The adapter is not troubled with it; a text prompt may have one, a prompt with a video may not."""
    family = FAMILIES["qwen2_vl"]
    model = family.model()
    sample = family.sample([[Text(3), Video(2), Text(4)]])
    tokens = sample.inputs["input_ids"].shape[1]
    mask = torch.ones(tokens, tokens).tril().bool()[None, None]
    text = {"input_ids": torch.arange(10, 20)[None], "attention_mask": torch.ones(10, 10).tril().bool()[None, None]}
    text["position_ids"] = torch.arange(10).expand(3, 1, -1)
    inputs = {**sample.inputs, "attention_mask": mask, "position_ids": torch.arange(tokens).expand(3, 1, -1)}
    with torch.no_grad():
        dense = model(**text).logits
        with tr.reduce(model, "random", budget=SHARE):
            assert torch.equal(model(**text).logits, dense)
            with pytest.raises(UnsupportedError, match="a 4-D attention mask is not supported"):
                model(**inputs)


# Modes ----------------------------------------------------------------------------------------------------------------


def test_labels() -> None:
    refused(tiny_model(), lambda model: forward(model, labels=prompt()), "labels are not supported")


def test_gradient_checkpointing() -> None:
    model = tiny_model()
    model.gradient_checkpointing_enable()
    message = r"gradient checkpointing is not supported while a pipeline is attached; call model.gradient_"
    refused(model, lambda model: forward(model.train()), message)


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.1}, {}], ids=["attention", "module"])
def test_dropout_in_training(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    if not changes:
        model.model.layers[1].mlp.act_fn = torch.nn.Sequential(model.model.layers[1].mlp.act_fn, torch.nn.Dropout(0.1))
        model.eval()
    refused(model, lambda model: forward(model.train()), "dropout in training mode is not supported")


def test_training_without_dropout_is_supported() -> None:
    model = tiny_model()
    with tr.reduce(model, "framefusion", budget=0.6, layout=layout()):
        expected = forward(model)
        model.train()
        out = model(input_ids=prompt()).logits
        assert torch.equal(out, expected)
        out[:, -1].logsumexp(-1).sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert gradient is not None
    assert float(gradient[prompt()[0, BEFORE]].abs().sum()) > 0  # A token of the first frame, into which others merged.


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_output_attentions(attention: str) -> None:
    match = "output_attentions is not supported while a pipeline is attached"
    refused(tiny_model(attention), lambda model: forward(model, output_attentions=True), match)
    if attention == "eager":
        refused(tiny_model(attention), lambda model: generate(model, output_attentions=True), match)
        model = tiny_model(attention)
        model.config.output_attentions = True
        with tr.reduce(model, "random", budget=SHARE, layout=layout()), pytest.raises(UnsupportedError, match=match):
            model.model(input_ids=prompt())


# Families -------------------------------------------------------------------------------------------------------------


def test_an_unknown_family() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedError, match=r"no adapter for model type 'Linear'; supported families: .*qwen2_vl"):
        tr.reduce(model, "random", layout=layout())


def test_layers_with_a_state_of_their_own() -> None:
    model = tiny_model()
    model.config.layer_types = ["full_attention", "hybrid"] * 2
    with pytest.raises(UnsupportedError, match=r"hybrid\), run attention and a state side by side"):
        tr.reduce(model, "random", budget=SHARE, layout=layout())
    assert hooks(model) == 0


def granite(**changes: Any) -> Any:
    torch.manual_seed(0)
    scales = {"residual_multiplier": 0.3, "attention_multiplier": 0.5, "embedding_multiplier": 2.0}
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**{**TEXT, **scales, **changes})).eval()


def test_a_family_whose_ffn_is_not_a_plain_sum() -> None:
    """Stages before the FFN are refused by the probe; stages before attention work."""
    model = granite()
    before = snapshot(model)
    with pytest.raises(UnsupportedError, match=r"GraniteForCausalLM \(decoder\): layer 0 is not x \+ FFN\(x\)"):
        tr.reduce(model, "framefusion", budget=SHARE, layout=layout())
    assert_same(model, before)
    with tr.reduce(model, "fastv", budget=SHARE, layout=layout()) as run:
        logits(model)
        assert run.trace.stages
    assert_same(model, before)


def test_a_family_without_a_point_before_the_ffn() -> None:
    torch.manual_seed(0)
    model = transformers.CohereForCausalLM(transformers.CohereConfig(**TEXT)).eval()
    with pytest.raises(UnsupportedError, match="layer 0 has no point between attention and FFN"):
        tr.reduce(model, "framefusion", budget=SHARE, layout=layout())
    assert hooks(model) == 0
