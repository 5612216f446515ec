"""Attach and detach: what a model is afterwards, whatever happened in between."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from support.families import FAMILIES, Text, Video
from support.tiny import PRESETS, SHARE, assert_same, generate, hooks, layout, logits, prompt, snapshot, tiny_model

import tokenreduce as tr
from tokenreduce.errors import AttachError, BudgetError
from tokenreduce.hookspecs import hookimpl
from tokenreduce.plugins import PluginWarning, manager


class StopError(Exception):
    """An error that is not ours."""


def raising(error: type[BaseException]) -> Any:
    def hook(*_: Any) -> None:
        raise error("stop")

    return hook


# Undo -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
def test_after_detach(preset: str, attention: str) -> None:
    model = tiny_model(attention)
    before, dense = snapshot(model), logits(model)
    with tr.reduce(model, preset, budget=SHARE, layout=layout()) as run:
        assert hooks(model) > 0
        reduced = logits(model)
        generate(model)
        assert run.trace.stages
    assert_same(model, before)
    assert torch.equal(logits(model), dense)
    assert not torch.equal(reduced[:, -1], dense[:, -1])


@pytest.mark.parametrize("name", FAMILIES)
def test_after_detach_of_every_family(name: str) -> None:
    family = FAMILIES[name]
    model = family.model()
    sample = family.sample([[Text(3), Video(3) if family.video else Text(2), Text(4)]])
    before = snapshot(model)
    with torch.no_grad():
        dense = model(**sample.inputs).logits
        before = snapshot(model)
        with tr.reduce(model, "random", budget=SHARE):
            model(**sample.inputs)
        assert_same(model, before)
        assert torch.equal(model(**sample.inputs).logits, dense)


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["layers.0", "layers.2.mlp", "layers.3.self_attn.q_proj", "norm"])
def test_after_an_error_inside_a_layer(where: str, error: type[BaseException]) -> None:
    model = tiny_model()
    dense = logits(model)
    handle = model.model.get_submodule(where).register_forward_hook(raising(error))
    before = snapshot(model)
    with pytest.raises(error), tr.reduce(model, "framefusion", budget=SHARE, layout=layout()):
        generate(model)
    assert_same(model, before)
    handle.remove()
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_a_broken_forward_leaves_the_next_one_alone(error: type[BaseException]) -> None:
    """Still attached after Ctrl-C: the next prompt is reduced like any other, and a text prompt runs dense."""
    model = tiny_model()
    text = prompt()[:, :9]
    dense = logits(model, text)
    with tr.reduce(model, "framefusion", budget=SHARE, layout=layout()) as run:
        expected = logits(model)
        handle = model.model.layers[2].register_forward_hook(raising(error))
        with pytest.raises(error):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), expected)
        handle = model.model.layers[2].register_forward_hook(raising(error))
        with pytest.raises(error):
            logits(model)
        handle.remove()
        run.layout = tr.TokenLayout.text(1, 9)
        assert torch.equal(logits(model, text), dense)


def test_after_an_error_inside_generate() -> None:
    model = tiny_model()
    before, dense = snapshot(model), generate(model)
    calls = []

    def processor(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        calls.append(ids.shape)
        if len(calls) == 3:
            raise StopError
        return scores

    with pytest.raises(StopError), tr.reduce(model, "fastv", budget=SHARE, layout=layout()):
        generate(model, logits_processor=[processor])
    assert_same(model, before)
    assert torch.equal(generate(model).sequences, dense.sequences)


def test_after_an_error_inside_an_observer() -> None:
    class Observer:
        @hookimpl
        def tokenreduce_observe(self, event: Any) -> None:
            raise StopError

    model, observer = tiny_model(), Observer()
    before, dense = snapshot(model), logits(model)
    manager().register(observer, "observer:failing")
    try:
        with tr.reduce(model, "fastv", budget=SHARE, layout=layout()):
            with pytest.warns(PluginWarning, match=r"failed as an observer of stage fastv at layer\[2\].*: StopError"):
                reduced = logits(model)
            assert torch.equal(logits(model), reduced), "it is told no more, and nothing warns"
    finally:
        manager().unregister(observer)
    assert_same(model, before)
    assert torch.equal(logits(model), dense)


def test_after_a_refused_budget() -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(BudgetError):
        tr.reduce(model, "fastv", budget=0.01, layout=layout())
    assert_same(model, before)


def test_after_ctrl_c_while_attaching() -> None:
    model = tiny_model()
    handle = model.model.layers[1].register_forward_hook(raising(KeyboardInterrupt))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        tr.reduce(model, "fastv", budget=SHARE, layout=layout())
    assert_same(model, before)
    handle.remove()
    tr.reduce(model, "fastv", budget=SHARE, layout=layout()).detach()


def test_a_training_model_stays_in_training() -> None:
    model = tiny_model().train()
    model.model.layers[1].eval()
    before = snapshot(model)
    tr.reduce(model, "framefusion", budget=SHARE, layout=layout()).detach()
    assert_same(model, before)


# Order ----------------------------------------------------------------------------------------------------------------


def test_attach_twice() -> None:
    model = tiny_model()
    before = snapshot(model)
    with tr.reduce(model, "fastv", budget=SHARE, layout=layout()):
        expected = logits(model)
        for other in ("fastv", "random"):
            with pytest.raises(AttachError, match="pipeline fastv is attached to this model already; detach it first"):
                tr.reduce(model, other, budget=SHARE, layout=layout())
        with pytest.raises(AttachError), tr.reduce(model.model, "random", budget=SHARE, layout=layout()):
            pass
        assert torch.equal(logits(model), expected)
    assert_same(model, before)


def test_detach_twice_and_in_the_wrong_order() -> None:
    one, two = tiny_model(seed=1), tiny_model(seed=2)
    before = snapshot(one), snapshot(two)
    first = tr.reduce(one, "fastv", budget=SHARE, layout=layout())
    second = tr.reduce(two, "random", budget=SHARE, layout=layout())
    first.detach()
    first.detach()
    assert_same(one, before[0])
    assert hooks(two) > 0
    again = tr.reduce(one, "random", budget=SHARE, layout=layout())
    first.detach()  # A run that is off does not take another one off.
    assert again.attached
    assert hooks(one) > 0
    second.detach()
    again.detach()
    assert_same(one, before[0])
    assert_same(two, before[1])


def test_a_run_does_not_keep_its_model_alive() -> None:
    model = tiny_model()
    run = tr.reduce(model, "random", budget=SHARE, layout=layout())
    logits(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    run.detach()


# Neither entered nor kept ---------------------------------------------------------------------------------------------


def test_a_result_that_is_thrown_away_says_so() -> None:
    model = tiny_model()
    dense = logits(model)
    with pytest.warns(
        UserWarning, match=r"neither entered nor kept: pipeline fastv stays .*`run.detach\(\)`"
    ) as warned:
        tr.reduce(model, "fastv", budget=SHARE, layout=layout())
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert not torch.equal(logits(model)[:, -1], dense[:, -1])  # It stays on, as it says.
    with pytest.raises(AttachError, match="pipeline fastv is attached to this model already"):
        tr.reduce(model, "fastv", budget=SHARE, layout=layout())


def test_a_result_that_was_of_use_is_let_go_of_in_silence() -> None:
    """Warnings are errors here, in finalizers too."""
    used, detached, entered, gone = (tiny_model(seed=seed) for seed in range(4))
    run = tr.reduce(used, "fastv", budget=SHARE, layout=layout())
    logits(used)
    del run
    tr.reduce(detached, "fastv", budget=SHARE, layout=layout()).detach()
    with tr.reduce(entered, "fastv", budget=SHARE, layout=layout()):
        pass
    run = tr.reduce(gone, "fastv", budget=SHARE, layout=layout())
    del gone
    gc.collect()
    del run
    tr.reduce(entered, {"name": "nothing", "stages": []})
    gc.collect()
    assert hooks(used) > 0
    assert hooks(detached) == hooks(entered) == 0


def test_the_result_of_a_plain_call_is_the_run() -> None:
    model = tiny_model()
    before, dense = snapshot(model), logits(model)
    run = tr.reduce(model, "fastv", budget=SHARE, layout=layout())
    assert run.attached
    assert repr(run) == "<Run of pipeline fastv: attached; detach() takes it off>"
    first = logits(model)
    assert run.trace.stages
    run.layout = tr.TokenLayout.text(*prompt().shape)
    assert torch.equal(logits(model), dense)
    run.layout = layout()
    with run:
        assert torch.equal(logits(model), first)
    assert not run.attached
    assert repr(run) == "<Run of pipeline fastv: not attached>"
    assert_same(model, before)


def test_a_with_block_after_an_error_at_the_call() -> None:
    """Attaching happens at the call, not on entering."""
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(BudgetError):
        tr.reduce(model, "fastv", budget=0.01, layout=layout())
    assert_same(model, before)
    entering = tr.reduce(model, "fastv", budget=SHARE, layout=layout())
    assert hooks(model) > 0
    with entering as run:
        assert run is entering
    assert_same(model, before)


@pytest.mark.parametrize("function", [tr.reduce, tr.stream])
def test_arguments_of_the_wrong_kind(function: Any) -> None:
    model = tiny_model()
    before = snapshot(model)
    name = function.__name__
    with pytest.raises(AttachError) as error:
        function("fastv", model)
    assert str(error.value) == (
        f"{name} takes a model and then a pipeline, got a value of type str for the model; the arguments are swapped: write "
        f"tr.{name}(model, pipeline)"
    )
    with pytest.raises(AttachError, match="got None for the model: write"):
        function(None, "fastv")
    with pytest.raises(AttachError, match=r"takes a pipeline as a preset's name.*got a value of type int"):
        function(model, 3)
    assert_same(model, before)


def test_a_trace_that_is_not_there() -> None:
    model = tiny_model()
    with tr.reduce(model, "random", budget=SHARE, layout=layout()) as run, pytest.raises(AttachError, match="no trace"):
        _ = run.trace


def test_attention_changed_while_attached() -> None:
    model = tiny_model()
    before = snapshot(model)
    with tr.reduce(model, "random", budget=SHARE, layout=layout()):
        model.set_attn_implementation("eager")
        with pytest.raises(AttachError, match="attention implementation was changed"):
            logits(model)
    assert_same(model, before)


# Nothing to do --------------------------------------------------------------------------------------------------------


def test_an_empty_pipeline_adds_no_hook() -> None:
    model = tiny_model()
    before, dense = snapshot(model), logits(model)
    with tr.reduce(model, {"name": "nothing", "stages": []}) as run:
        assert_same(model, before)
        assert torch.equal(logits(model), dense)
        with pytest.raises(AttachError, match="an empty pipeline adds no hook"):
            _ = run.trace
    assert_same(model, before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_pipeline_that_keeps_all_changes_no_bit(preset: str, attention: str) -> None:
    model = tiny_model(attention)
    loaded = tr.load_pipeline(preset).model_dump(exclude_none=True, by_alias=True)
    loaded["budget"] = {**(loaded.get("budget") or {}), "tokens": 1.0}
    for stage in loaded["stages"]:
        if "keep" in stage:
            stage["keep"] = 1.0
    ids, mask = torch.cat([prompt(rows=2)]), torch.ones(2, prompt().shape[1], dtype=torch.long)
    mask[1, :2] = 0
    streaming = preset == "streaming_llm"  # Its span moves on with each generated token: only the prefill keeps all.
    tokens = 1 if streaming else 6
    both = tr.TokenLayout(slot=layout().slot.expand(2, -1), frame=layout().frame.expand(2, -1))
    dense = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
    generated = generate(model, tokens=tokens).logits
    with torch.no_grad(), tr.reduce(model, loaded, layout=both) as run:
        reduced = model(input_ids=ids, attention_mask=mask).logits[mask.bool()]
        assert torch.equal(reduced, dense)
        run.layout = layout()
        for ours, theirs in zip(generate(model, tokens=tokens).logits, generated, strict=True):
            assert torch.equal(ours, theirs)
        assert run.trace.relative_tokens == [1.0]


def test_a_model_whose_dtype_changes_while_attached_is_counted_as_it_is() -> None:
    """A budget in bytes is kept, and the trace tells the truth, whatever dtype the model has at the forward."""
    model = tiny_model()
    limit = int(0.8 * held_bytes(model))
    model.to(torch.bfloat16)
    with tr.reduce(model, "fastv", budget={"kv_cache": f"{limit}B"}, layout=layout()) as run:
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            model.to(dtype)
            held = held_bytes(model)
            assert run.trace.kv_bytes == held, dtype
            assert held <= limit, dtype


def held_bytes(model: Any) -> int:
    """Bytes of keys and values after a prefill."""
    cache = model(input_ids=prompt(), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
