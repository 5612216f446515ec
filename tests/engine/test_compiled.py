"""torch.compile of a model with a pipeline attached: one graph for all layers, and the tokens and logits of the plain model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.matrix import BY_NAME, FAMILIES, PROMPTS, TOLERANCE, model
from support.tiny import FRAMES, PER_FRAME, SHARE, TOKENS, forward, generate, hooks, layout, prompt, tiny_model
from torch import Tensor, nn

import tokenreduce as tr
from tokenreduce.errors import PipelineError, PluginError, UnsupportedError

FIXED = ("fastv", "merge_only", "streaming_llm")
"""A stage that reads attention, one that merges, one at a `kv` site."""
MORE = ("prune_only", "prune_then_merge", "random", "uniform_frames", "noncascaded_merge")
PIPELINES = [*FIXED, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
LAYERS = 4


class Counter:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def calls(self, *names: str) -> list[int]:
        """How many calls of functions called like one of `names` each graph has, graphs without any left out."""
        found = [sum(any(n in str(node.target) for n in names) for node in graph.graph.nodes) for graph in self.graphs]
        return [count for count in found if count]

    def attentions(self) -> list[int]:
        """How many layers' attention each graph has."""
        return self.calls("scaled_dot_product_attention", "tokenreduce.reduced_attention")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test, and room for as many as a test makes."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch._dynamo.reset()


def compile_layers(subject: Any, backend: Any) -> None:
    """All layers in one graph: fullgraph refuses to compile if anything breaks it."""
    subject.model.forward = torch.compile(subject.model.forward, backend=backend, fullgraph=True)


def reduced(subject: Any, pipeline: str, **options: Any) -> tuple[Tensor, tr.Trace]:
    """Logits and trace of a prefill with the pipeline attached for its length."""
    with tr.reduce(subject, pipeline, budget=SHARE, layout=options.pop("given", None) or layout()) as run:
        return forward(subject, use_cache=True, **options), run.trace


def same(ours: tuple[Tensor, tr.Trace], expected: tuple[Tensor, tr.Trace]) -> None:
    torch.testing.assert_close(ours[0], expected[0], atol=5e-5, rtol=0)
    assert torch.equal(ours[1].source, expected[1].source)
    assert [kept.tolist() for kept in ours[1].kept] == [kept.tolist() for kept in expected[1].kept]
    assert str(ours[1]) == str(expected[1])  # Tokens, FLOPs and stages of every layer.


# One graph ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_all_layers_are_one_graph(pipeline: str) -> None:
    expected = reduced(tiny_model(), pipeline)
    subject, backend = tiny_model(), Counter()
    compile_layers(subject, backend)
    for _ in range(2):  # The second time, the graph is there.
        same(reduced(subject, pipeline), expected)
        assert len(backend.graphs) == 1
    assert backend.attentions() == [LAYERS]
    operators = {"streaming_llm": LAYERS, "noncascaded_merge": LAYERS, "prune_then_merge": 2}.get(pipeline, 1)
    assert backend.calls("tokenreduce") == [operators]


def test_the_whole_model_breaks_its_graph_only_around_the_decoder() -> None:
    """Where the engine begins and ends, as the dense model would not; never between two layers."""
    expected = reduced(tiny_model(), "fastv")
    subject, backend = tiny_model(), Counter()
    compiled = torch.compile(subject, backend=backend)
    with tr.reduce(compiled, "fastv", budget=SHARE, layout=layout()) as run:
        for _ in range(2):
            same((forward(compiled, use_cache=True), run.trace), expected)
    assert backend.attentions() == [LAYERS]
    assert len(backend.graphs) <= 3  # The decoder, the slice of its output, the head.
    assert hooks(subject) == 0


def test_compiled_layers() -> None:
    """Regional compilation: each layer is its own graph."""
    expected = reduced(tiny_model(), "fastv")
    subject, backend = tiny_model(), Counter()
    for layer in subject.model.layers:
        layer.compile(backend=backend, fullgraph=True)
    for _ in range(2):
        same(reduced(subject, "fastv"), expected)
    assert backend.attentions() == [1] * LAYERS


@pytest.mark.parametrize("pipeline", ["fastv", pytest.param("streaming_llm", marks=pytest.mark.slow)])
def test_generation(pipeline: str) -> None:
    plain, subject, backend = tiny_model(), tiny_model(), Counter()
    with tr.reduce(plain, pipeline, budget=SHARE, layout=layout()):
        expected = generate(plain)
    subject.model.compile(backend=backend)
    with tr.reduce(subject, pipeline, budget=SHARE, layout=layout()):
        ours = generate(subject)
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), atol=5e-5, rtol=0)
    assert set(backend.attentions()) == {LAYERS}


# A life with a compiled model ---------------------------------------------------------------------------------------------


def test_attach_and_detach_after_compile() -> None:
    plain, subject, backend = tiny_model(), tiny_model(), Counter()
    compile_layers(subject, backend)
    dense = forward(subject)
    expected = {name: reduced(plain, name) for name in ("fastv", "random")}
    for _ in range(2):
        for name, each in expected.items():
            same(reduced(subject, name), each)
            assert torch.equal(forward(subject), dense)
    assert len(backend.graphs) == 3  # Dense and each pipeline once: no graph is used for another, none is made twice.
    assert torch.equal(dense, forward(plain))


def test_a_graph_without_a_pipeline_is_not_used_with_one() -> None:
    """Neither for the model it was made for nor for another one: hooks put on later do not guard it.

    The head's part of it is used again, and so the head's FLOPs are not in the trace (docs/compile.md).
    """
    dense = forward(tiny_model(), use_cache=True)
    expected = reduced(tiny_model(), "fastv")
    subject, backend = tiny_model(), Counter()
    subject.compile(backend=backend)
    assert torch.equal(forward(subject, use_cache=True), dense)
    another = tiny_model()
    another.compile(backend=backend)
    for each in (subject, another):
        ours, trace = reduced(each, "fastv")
        torch.testing.assert_close(ours, expected[0], atol=5e-5, rtol=0)
        assert torch.equal(trace.source, expected[1].source)
        assert [layer.tokens.tolist() for layer in trace.layers] == [
            layer.tokens.tolist() for layer in expected[1].layers
        ]
        assert torch.equal(forward(each, use_cache=True), dense)


def test_models_that_share_a_configuration() -> None:
    """The graph of the one without a pipeline is not used for the other."""
    expected = reduced(tiny_model(), "fastv")
    dense, backend = tiny_model(), Counter()
    subject = type(dense)(dense.config).eval()
    subject.load_state_dict(dense.state_dict())
    logits = forward(dense)
    for each in (dense, subject):
        each.compile(backend=backend)
    with tr.reduce(subject, "fastv", budget=SHARE, layout=layout()) as run:
        for _ in range(2):
            assert torch.equal(forward(dense), logits)
            same((forward(subject, use_cache=True), run.trace), expected)


def test_other_lengths_and_a_padded_batch() -> None:
    plain, subject, backend = tiny_model(), tiny_model(), Counter()
    compile_layers(subject, backend)
    short = tr.TokenLayout.video(before=3, frames=FRAMES - 1, per_frame=PER_FRAME, after=5)
    ids = prompt()[:, : TOKENS - PER_FRAME]
    pad = (PER_FRAME, 0)
    both = tr.TokenLayout(
        slot=torch.cat([layout().slot, nn.functional.pad(short.slot, pad, value=-1)]),
        frame=torch.cat([layout().frame, nn.functional.pad(short.frame, pad, value=-1)]),
    )
    batch = torch.cat([prompt(), nn.functional.pad(ids, pad)])
    mask = (torch.arange(TOKENS) >= torch.tensor([[0], [PER_FRAME]])).long()
    calls: list[dict[str, Any]] = [
        {},
        {"ids": ids, "given": short},
        {"ids": batch, "given": both, "attention_mask": mask},
    ]
    for call in calls:
        same(reduced(subject, "fastv", **call), reduced(plain, "fastv", **call))
    same(reduced(subject, "fastv"), reduced(plain, "fastv"))


@pytest.mark.slow
def test_turns_on_one_cache() -> None:
    def turns(subject: Any) -> list[Tensor]:
        out = []
        with torch.no_grad(), tr.reduce(subject, "fastv", budget=SHARE, layout=layout()) as run:
            first = subject(input_ids=prompt(), use_cache=True)
            for number, tokens in enumerate((3, 1, 1)):
                ids = prompt(number + 1)[:, :tokens]
                out.append(subject(input_ids=ids, past_key_values=first.past_key_values).logits)
            run.layout = layout()
            out.append(subject(input_ids=prompt(7), past_key_values=first.past_key_values).logits)
            cache = first.past_key_values
        with pytest.raises(
            UnsupportedError, match="this KV cache was reduced by tokenreduce, and no pipeline is attached"
        ):
            subject(input_ids=prompt()[:, :1], past_key_values=cache)
        return out

    subject = tiny_model()
    subject.model.compile(backend=Counter())
    for ours, expected in zip(turns(subject), turns(tiny_model()), strict=True):
        torch.testing.assert_close(ours, expected, atol=5e-5, rtol=0)


def test_two_threads() -> None:
    plain, subject = tiny_model(), tiny_model()
    compile_layers(subject, Counter())
    seeds = (1, 2)
    expected, got = {}, {}
    for seed in seeds:
        expected[seed] = reduced(plain, "fastv", ids=prompt(seed))
    with tr.reduce(subject, "fastv", budget=SHARE, layout=layout()) as run:
        forward(subject, use_cache=True)

        def work(seed: int) -> None:
            for _ in range(5):
                got[seed] = (forward(subject, ids=prompt(seed), use_cache=True), run.trace)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for seed in seeds:
        same(got[seed], expected[seed])


# Refused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "decoder", "forward", "layer", "function"])
def test_counts_that_depend_on_the_video(part: str) -> None:
    subject: Any = tiny_model()
    call, backend = subject, Counter()
    if part == "model":
        call = torch.compile(subject, backend=backend)
    elif part == "decoder":
        subject.model.compile(backend=backend)
    elif part == "forward":
        compile_layers(subject, backend)
    elif part == "layer":
        subject.model.layers[1].compile(backend=backend)
    else:
        call = torch.compile(lambda **options: subject(**options), backend=backend)
    match = (
        "similarity_merge leaves a number of tokens that depends on the video, which a compiled model does not support"
    )
    with tr.reduce(subject, "framefusion", budget=SHARE, layout=layout()), pytest.raises(UnsupportedError, match=match):
        forward(call)
    assert backend.attentions() == []
    assert hooks(subject) == 0


def test_gradients() -> None:
    subject = tiny_model()
    subject.model.compile(backend=Counter())
    with tr.reduce(subject, "fastv", budget=SHARE, layout=layout()):
        with pytest.raises(UnsupportedError, match="gradients through a compiled model are not supported"):
            subject(input_ids=prompt())
        with torch.inference_mode():
            subject(input_ids=prompt())


def test_streams() -> None:
    subject = tiny_model()
    subject.model.compile(backend=Counter())
    plan = {"stages": [{"strategy": "streaming_window", "window": 12}]}
    with tr.stream(subject, plan, width=8) as stream:
        stream.feed_text(prompt())
        with pytest.raises(UnsupportedError, match="a stream does not support a compiled model"):
            stream.finish()


def test_a_forecast_that_does_not_come_true() -> None:
    """Frames of different sizes: how many tokens whole frames are is known only when they are looked at."""
    frame = layout().frame.clone()
    frame[frame == 1] = 0
    uneven = tr.TokenLayout(slot=torch.where(frame >= 0, torch.arange(TOKENS), -1), frame=frame)
    subject = tiny_model()
    reduced(subject, "uniform_frames", given=uneven)
    compile_layers(subject, Counter())
    match = r"uniform_frames at layer\[0\].pre_attention left \d+ tokens of row 0, where its forecast said \d+; a compiled model"
    with pytest.raises(PipelineError, match=match):
        reduced(subject, "uniform_frames", given=uneven)
    assert hooks(subject) == 0
    same(reduced(subject, "uniform_frames"), reduced(tiny_model(), "uniform_frames"))


def test_an_error_inside_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reduced(tiny_model(), "random")
    subject = tiny_model()
    compile_layers(subject, Counter())
    same(reduced(subject, "random"), expected)
    with monkeypatch.context() as patch:
        patch.setattr("tokenreduce.strategies.controls.random.RandomPrune.decide", lambda self, ctx: 1 / 0)
        with pytest.raises(PluginError, match=r"strategy random at layer.0..pre_attention failed: ZeroDivisionError"):
            reduced(subject, "random")
    assert hooks(subject) == 0
    same(reduced(subject, "random"), expected)


# Everything ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("given", ["single", "ragged"])
@pytest.mark.parametrize("name", BY_NAME)
def test_every_pipeline(name: str, given: str) -> None:
    """Compiled as not compiled, which the oracle matrix holds to the oracle; content-dependent ones are refused."""
    number = list(BY_NAME).index(name)
    family = list(FAMILIES)[number % len(FAMILIES)]
    subject, inputs = model(family), PROMPTS[given]()

    def prefill() -> tuple[Tensor, tr.Trace]:
        with torch.no_grad(), tr.reduce(subject, BY_NAME[name].load(), layout=inputs.layout) as run:
            return subject(**inputs.inputs, position_ids=inputs.positions).logits, run.trace

    expected, backend = prefill(), Counter()
    compile_layers(subject, backend)
    if any(getattr(stage, "threshold", None) is not None for stage in BY_NAME[name].load().stages):
        with pytest.raises(UnsupportedError, match="depends on the video"):
            prefill()
        return
    if given == "ragged" and any(stage.strategy == "uniform_frames" for stage in BY_NAME[name].load().stages):
        # A row has frames of different sizes.
        with pytest.raises(PipelineError, match="where its forecast said"):
            prefill()
        return
    logits, trace = prefill()
    torch.testing.assert_close(logits, expected[0], atol=TOLERANCE[torch.float64], rtol=0)
    assert str(trace) == str(expected[1])
    assert torch.equal(trace.source, expected[1].source)
    assert len(backend.graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", FIXED)
def test_inductor(pipeline: str) -> None:
    expected = reduced(tiny_model(), pipeline)
    subject = tiny_model()
    subject.compile()
    for _ in range(2):
        same(reduced(subject, pipeline), expected)
