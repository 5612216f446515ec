"""MiniCPM-V 2.6: the native model against tensors that upstream's code made."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.minicpm_v_golden import (
    CASES,
    error,
    golden,
    golden_inputs,
    greedy,
    load,
    pad_left,
    table,
    upstream_folder,
)
from torch import Tensor

from tokenreduce.errors import LayoutError
from tokenreduce.models.minicpm_v.modeling import MiniCPMVConfig, MiniCPMVForConditionalGeneration
from tokenreduce.models.minicpm_v.vision import NavitEmbeddings, Resampler, position_buckets, sincos_positions

Model = MiniCPMVForConditionalGeneration


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(upstream_folder(tmp_path_factory.mktemp("minicpm") / "tiny"))


# Golden tensors


def test_position_buckets_are_upstreams_at_every_size() -> None:
    buckets = table("position_buckets")["bucket"]
    assert len(buckets) == 70
    for patches, expected in buckets.items():
        assert position_buckets(int(patches)).tolist() == expected, patches


@pytest.mark.parametrize(("rows", "columns"), [(25, 40), (49, 58), (1, 70), (50, 55)])
def test_tower_looks_positions_up_in_those_buckets(rows: int, columns: int) -> None:
    config = MiniCPMVConfig(vision_config={"hidden_size": 1, "image_size": 980, "patch_size": 14}).vision_config
    embeddings = NavitEmbeddings(config)
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.bias.zero_()
    embeddings.position_embedding.weight.copy_(torch.arange(4900.0)[:, None])
    found = embeddings(torch.zeros(1, 3, 14 * rows, 14 * columns), torch.ones(1, rows, columns, dtype=torch.bool))
    buckets = table("position_buckets")["bucket"]
    expected = [70 * h + w for h in buckets[str(rows)] for w in buckets[str(columns)]]
    assert found.flatten().tolist() == expected


def test_resampler_with_two_heads() -> None:
    case = golden("resampler_2heads")
    resampler = Resampler(16, 256, 24)
    resampler.load_state_dict({key[3:]: value.float() for key, value in case.items() if key.startswith("sd.")})
    assert error(sincos_positions(4, 8, 256), case["pos_embed_4x8"].flatten(0, 1)) <= 1e-6
    for x, (rows, columns), expected in zip(case["x"], case["tgt_sizes"].tolist(), case["output"], strict=True):
        assert error(resampler(x[None, : rows * columns], rows, columns)[0], expected) <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_golden_hidden_states_embeddings_logits_and_answer(model: Model, name: str) -> None:
    case, inputs = golden(name), golden_inputs(name)
    sizes = [(int(h), int(w)) for h, w in case["tgt_sizes"]]
    hidden: list[Tensor] = []
    hook = model.vpm.register_forward_hook(lambda module, args, out: hidden.extend(out.last_hidden_state))
    features = model.encode_pictures(inputs["pixel_values"][0], sizes)
    hook.remove()
    order = [i for size in dict.fromkeys(sizes) for i, other in enumerate(sizes) if other == size]
    for index, found in zip(order, hidden, strict=True):
        assert (
            error(found, case["vpm_last_hidden_state"][index][case["vpm_patch_attention_mask"][index].bool()]) <= 1e-5
        )
    assert error(features, case["resampler_output"]) <= 1e-5
    embeds = model.embed(inputs["input_ids"], inputs["pixel_values"], inputs["tgt_sizes"])
    assert error(embeds[0], case["inputs_embeds"]) <= 1e-5
    assert error(model(**inputs).logits[0, -8:], case["logits_last8"]) <= 2e-5
    assert greedy(model, inputs)[0].tolist() == case["greedy_tokens"].tolist()


def test_places_of_pictures_are_upstreams_bounds(model: Model) -> None:
    for name in CASES:
        case = golden(name)
        expected = torch.zeros_like(case["input_ids"], dtype=torch.bool)
        for start, end in case["image_bound"].tolist():
            expected[0, start:end] = True
        assert torch.equal(model.picture_places(case["input_ids"]), expected)


# Inputs of the model


def test_rows_of_a_left_padded_batch_are_as_alone(model: Model) -> None:
    rows = [golden_inputs(name) for name in CASES]
    batch = pad_left(rows, pad=257)
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions).logits[:, -8:]
    for index, row in enumerate(rows):
        assert error(logits[index], model(**row).logits[0, -8:]) <= 2e-5
    answers = greedy(model, batch)
    assert answers.tolist() == [golden(name)["greedy_tokens"].tolist() for name in CASES]


def test_beams_share_pictures_and_answer_as_from_embeddings(model: Model) -> None:
    batch = pad_left([golden_inputs(name) for name in CASES], pad=257)
    seen: list[int] = []
    hook = model.resampler.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    answers = greedy(model, batch, num_beams=3, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4)
    hook.remove()
    assert sum(seen) == 4 + 9
    embeds = model.embed(batch["input_ids"], batch["pixel_values"], batch["tgt_sizes"])
    expected = model.llm.generate(
        inputs_embeds=embeds,
        attention_mask=batch["attention_mask"],
        num_beams=3,
        num_return_sequences=2,
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
        eos_token_id=[259, 257],
        pad_token_id=257,
    )
    assert torch.equal(answers, expected)


def test_a_second_turn_places_only_the_new_pictures(model: Model) -> None:
    first, second = golden_inputs("video_1slice"), golden_inputs("video_sliced")
    both = {
        "input_ids": torch.cat([first["input_ids"], second["input_ids"]], 1),
        "tgt_sizes": torch.cat([first["tgt_sizes"], second["tgt_sizes"]], 1),
        "pixel_values": torch.cat([torch.nn.functional.pad(first["pixel_values"], (0, 14)), second["pixel_values"]], 1),
    }
    expected = model(**both).logits[0, -8:]
    cache = model(**first).past_key_values
    logits = model(**(both | {"input_ids": second["input_ids"]}), past_key_values=cache).logits[0, -8:]
    assert error(logits, expected) <= 2e-5


def test_decoder_is_found_and_gets_embeddings_and_a_flat_mask(model: Model) -> None:
    assert model.language_model.model is model.llm.model
    calls: list[dict[str, object]] = []
    hook = model.llm.model.register_forward_pre_hook(lambda module, args, kw: calls.append(kw), with_kwargs=True)
    batch = pad_left([golden_inputs(name) for name in CASES], pad=257)
    greedy(model, batch, max_new_tokens=2, min_new_tokens=2)
    hook.remove()
    assert [tuple(call["inputs_embeds"].shape) for call in calls] == [(2, 672, 128), (2, 1, 128)]
    assert [tuple(call["attention_mask"].shape) for call in calls] == [(2, 672), (2, 673)]


def test_stray_tags_and_unk_in_a_question_are_text(model: Model) -> None:
    ids = torch.tensor([[260, 256, 256, 261, 256, 270, *[256] * 63, 271, 260, *[256] * 64, 271, *[256] * 80]])
    assert not model.picture_places(ids).any()
    assert torch.equal(model.embed(ids), model.get_input_embeddings()(ids))


def test_more_pictures_of_a_size_than_pass_at_once(model: Model) -> None:
    pixels = torch.randn(18, 3, 14, 14 * 6, generator=torch.Generator().manual_seed(0))
    sizes = [(2, 3)] * 17 + [(3, 2)]
    together = model.encode_pictures(pixels, sizes)
    for index, size in enumerate(sizes):
        assert error(model.encode_pictures(pixels[index : index + 1], [size])[0], together[index]) <= 1e-5


@pytest.mark.parametrize("change", ["fewer", "more", "none", "rows"])
def test_pictures_that_do_not_fit_their_places_are_refused(model: Model, change: str) -> None:
    inputs = golden_inputs("video_1slice")
    if change == "fewer":
        inputs["tgt_sizes"], inputs["pixel_values"] = inputs["tgt_sizes"][:, :3], inputs["pixel_values"][:, :3]
    elif change == "more":
        inputs["tgt_sizes"] = inputs["tgt_sizes"].repeat(1, 2, 1)
    elif change == "none":
        del inputs["pixel_values"]
    else:
        inputs |= {key: inputs[key].repeat(2, *[1] * (inputs[key].dim() - 1)) for key in ("pixel_values", "tgt_sizes")}
    with pytest.raises(LayoutError, match=r"pixel_values"):
        model(**inputs)
