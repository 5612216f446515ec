"""Threads that share a model, threads that do not, and many requests in a row."""

from __future__ import annotations

import gc
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support.families import FAMILIES, Text, Video
from support.tiny import assert_same, generate, hooks, layout, live_tensors, logits, prompt, snapshot, tiny_model

import tokenreduce as tr
from tokenreduce.engine import run as engine_run
from tokenreduce.engine.cache.layers import running
from tokenreduce.engine.model import leases
from tokenreduce.engine.model.hooks import Hook
from tokenreduce.errors import AttachError, UnsupportedError

THREADS, ROUNDS = 4, 3


@pytest.fixture(autouse=True)
def switch_often() -> Iterator[None]:
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """`work(0 … threads − 1)` in as many threads, started together."""
    barrier = threading.Barrier(threads)

    def start(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(start, range(threads)))


def answer(model: Any, seed: int, run: Any) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens and logits of a generation, and what its own trace says was kept."""
    out = generate(model, prompt(seed), tokens=5)
    return out.sequences, torch.stack(out.logits), run.trace.kept[0].tolist()


def assert_equal(ours: Any, theirs: Any) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("preset", ["framefusion", "fastv", "streaming_llm", "noncascaded_merge"])
def test_threads_on_one_attached_model(preset: str) -> None:
    model = tiny_model()
    before = snapshot(model)
    with tr.reduce(model, preset, budget=0.8, layout=layout()) as run:
        seeds = range(THREADS * ROUNDS)
        expected = [answer(model, seed, run) for seed in seeds]
        assert len({tuple(kept) for _, _, kept in expected}) > 1 or preset in ("streaming_llm", "noncascaded_merge")
        got = at_once(lambda thread: [answer(model, seed, run) for seed in seeds[thread::THREADS]])
        for thread in range(THREADS):
            for ours, theirs in zip(got[thread], expected[thread::THREADS], strict=True):
                assert_equal(ours, theirs)
    assert_same(model, before)


class Yielding:
    """A lock after which other threads come first: what should be one step is seen to be two."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        time.sleep(0.002)


def test_a_thread_that_ends_does_not_take_the_hooks_from_one_that_begins() -> None:
    model = tiny_model(num_hidden_layers=2)
    with tr.reduce(model, "random", budget=0.8, layout=layout()) as run:
        run._active.lock = Yielding()  # type: ignore[assignment]
        expected = [logits(model, prompt(seed)) for seed in range(THREADS)]
        got = at_once(lambda thread: [logits(model, prompt(thread)) for _ in range(40)])
    for thread in range(THREADS):
        for ours in got[thread]:
            assert torch.equal(ours, expected[thread])


def test_a_hook_of_a_layer_called_for_nothing() -> None:
    """Another thread may take the hooks off between torch's looking at them and calling them: then without keywords."""
    model = tiny_model()
    with tr.reduce(model, "framefusion", budget=0.8, layout=layout()) as run:
        run._active.layer_hooks.install()
        for layer in model.model.layers:
            for module in (layer, layer.post_attention_layernorm):
                hook = list(module._forward_pre_hooks.values())[-1]
                assert hook(module, (torch.zeros(1, 1, 32),)) is None
        run._active.layer_hooks.remove()


def test_threads_with_prompts_of_different_length_and_text() -> None:
    """A family's own layout: each thread brings another number of frames, one of them none."""
    family = FAMILIES["qwen2_vl"]
    model = family.model()
    rows = [[Text(3), Video(2), Text(4)], [Text(9)], [Text(2), Video(4), Text(3)], [Text(5), Video(3), Text(2)]]
    samples = [family.sample([row], seed=number) for number, row in enumerate(rows)]

    def work(number: int) -> list[torch.Tensor]:
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
        return [model.generate(**samples[number].inputs, **options) for _ in range(ROUNDS)]

    with tr.reduce(model, "framefusion", budget=0.7):
        expected = [work(number) for number in range(len(rows))]
        for ours, theirs in zip(at_once(work), expected, strict=True):
            assert_equal(ours, theirs)


def test_an_error_in_one_thread_is_none_of_the_others_business() -> None:
    model = tiny_model()
    with tr.reduce(model, "framefusion", budget=0.8, layout=layout()) as run:
        expected = [answer(model, seed, run) for seed in range(THREADS)]

        def work(thread: int) -> list[Any]:
            if thread:
                return [answer(model, thread, run) for _ in range(ROUNDS)]
            for _ in range(ROUNDS * 4):
                with pytest.raises(tr.TokenReduceError):
                    logits(model, prompt()[:, 1:])
            return []

        got = at_once(work)
        for thread in range(1, THREADS):
            for ours in got[thread]:
                assert_equal(ours, expected[thread])


def test_two_attachments_on_two_models() -> None:
    models = [tiny_model(seed=seed) for seed in range(2)]
    presets = ["framefusion", "random"]

    def work(number: int) -> list[Any]:
        answers = []
        for _ in range(ROUNDS):
            with tr.reduce(models[number], presets[number], budget=0.8, layout=layout()) as run:
                answers.append(answer(models[number], number, run))
                strategies = {stage.strategy for stage in run.trace.stages}
                assert ("random" in strategies) == (presets[number] == "random")
        return answers

    befores = [snapshot(model) for model in models]
    expected = [work(number)[0] for number in range(2)]
    for number, answers in enumerate(at_once(work, 2)):
        for ours in answers:
            assert_equal(ours, expected[number])
        assert_same(models[number], befores[number])


def within(model: Any, call: Callable[[], Any]) -> tuple[torch.Tensor, Any]:
    """Logits of `model`, and what `call` answered in the middle of that forward."""
    answers: list[Any] = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: None if answers else answers.append(call()))
    try:
        return logits(model), answers[0]
    finally:
        handle.remove()


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("preset", ["framefusion", "fastv", "streaming_llm"])
def test_a_model_called_within_another_that_shares_its_configuration(preset: str, thread: bool) -> None:
    """The end of the inner forward is not that of the outer one, in this thread or in another."""
    outer, inner = tiny_model(), tiny_model(seed=1)
    inner = type(inner)(outer.config).eval()
    before = snapshot(outer)
    call: Callable[[], Any] = lambda: logits(inner)  # noqa: E731
    if thread:
        call = lambda: at_once(lambda _: logits(inner), 1)[0]  # noqa: E731
    dense = logits(inner)
    with tr.reduce(outer, preset, budget=0.8, layout=layout()) as run:
        expected = logits(outer), dense
        kept = run.trace.kept
        assert_equal(within(outer, call), expected)
        with tr.reduce(inner, "random", budget=0.8, layout=layout()):
            assert_equal(within(outer, call), (expected[0], logits(inner)))
        assert_equal(run.trace.kept, kept)
    assert_same(outer, before)


def test_a_model_called_within_itself_is_refused() -> None:
    """The outer forward goes on as if nothing had happened."""
    model = tiny_model()

    def call() -> str:
        with pytest.raises(UnsupportedError, match="called within a forward of its own") as error:
            logits(model)
        return str(error.value)

    before = snapshot(model)
    with tr.reduce(model, "framefusion", budget=0.8, layout=layout()) as run:
        expected, kept = logits(model), run.trace.kept[0]
        ours, message = within(model, call)
        assert torch.equal(ours, expected)
        assert torch.equal(run.trace.kept[0], kept)
        assert "Qwen2ForCausalLM" in message
    assert_same(model, before)


@pytest.mark.parametrize("first", ["outer", "inner"])
def test_ctrl_c_in_a_model_called_within_another(first: str) -> None:
    """Whichever is called next: neither finds anything of what was broken off."""
    models = {"outer": tiny_model(), "inner": tiny_model(seed=1)}
    befores = {name: snapshot(model) for name, model in models.items()}

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with (
        tr.reduce(models["outer"], "streaming_llm", budget=0.8, layout=layout()),
        tr.reduce(models["inner"], "framefusion", budget=0.8, layout=layout()),
    ):
        expected = {name: logits(model) for name, model in models.items()}
        handle = models["inner"].model.layers[2].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            within(models["outer"], lambda: logits(models["inner"]))
        handle.remove()
        for name in sorted(models, reverse=first == "outer"):
            assert torch.equal(logits(models[name]), expected[name])
        assert running.forward is None
    for name, model in models.items():
        assert_same(model, befores[name])


def test_one_model_is_attached_by_one_thread_only() -> None:
    model = tiny_model()
    before = snapshot(model)

    def work(thread: int) -> Any:
        try:
            return tr.reduce(model, "random", budget=0.8, layout=layout())
        except tr.TokenReduceError as error:
            return str(error)

    runs = at_once(work)
    attached = [run for run in runs if not isinstance(run, str)]
    assert len(attached) == 1
    assert all("is attached to this model already" in text for text in runs if isinstance(text, str))
    attached[0].detach()
    assert_same(model, before)


def test_detach_waits_for_a_forward_in_another_thread() -> None:
    model = tiny_model()
    before = snapshot(model)
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    run = tr.reduce(model, "random", budget=0.8, layout=layout())
    expected = logits(model)
    handle = model.model.layers[2].register_forward_pre_hook(hold)
    with ThreadPoolExecutor(2) as pool:
        forward = pool.submit(logits, model)
        assert inside.wait(30)
        detaching = pool.submit(run.detach)
        assert not detaching.done()
        assert run.attached
        go_on.set()
        assert torch.equal(forward.result(30), expected)
        detaching.result(30)
    handle.remove()
    assert_same(model, before)


def test_many_requests_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """500 requests on one attachment, and 30 attachments: no hook, no tensor and no memory stays."""
    monkeypatch.setattr(engine_run, "TRACES", 8)  # A run keeps the receipts of its last calls, by design: a thousand.
    model = tiny_model(num_hidden_layers=2)
    before = snapshot(model)

    def requests(count: int) -> None:
        for seed in range(count):
            logits(model, prompt(seed % 7))

    with tr.reduce(model, "framefusion", budget=0.8, layout=layout()):
        requests(10)
        hooked, tensors, objects = hooks(model), live_tensors(), len(gc.get_objects())
        requests(280)
        for seed in range(100):
            generate(model, prompt(seed % 7), tokens=2)
        assert hooks(model) == hooked
        assert live_tensors() <= tensors + 5
        assert len(gc.get_objects()) <= objects + 200
        tracemalloc.start()
        requests(60)  # Python's lists of freed objects fill up first, attached or not.
        gc.collect()
        start, _ = tracemalloc.get_traced_memory()
        requests(60)
        gc.collect()
        end, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert end - start < 30_000, f"{end - start} bytes more after 60 requests"
    assert_same(model, before)
    tensors = 0
    for number in range(30):
        with tr.reduce(model, "random", budget=0.8, layout=layout()):
            logits(model)
        if number == 5:
            tensors = live_tensors()
    assert live_tensors() <= tensors + 10
    assert hooks(model) == 0


def test_detach_while_a_forward_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that has begun, and of which nothing is on the layers yet, is waited for too."""
    model, ids = tiny_model(), prompt()
    before, dense = snapshot(model), logits(model)
    inside, go_on, found = threading.Event(), threading.Event(), list[torch.Tensor]()
    refuse_mode = engine_run.refuse_mode

    def slow(*args: Any) -> None:
        inside.set()
        assert go_on.wait(30)
        refuse_mode(*args)

    monkeypatch.setattr(engine_run, "refuse_mode", slow)
    run = tr.reduce(model, "fastv", budget=0.8, layout=layout())
    worker = threading.Thread(target=lambda: found.append(logits(model)))
    worker.start()
    assert inside.wait(30)
    off = threading.Thread(target=run.detach)
    off.start()
    off.join(0.2)
    assert run.attached
    go_on.set()
    worker.join(30)
    off.join(30)
    assert not run.attached
    assert found[0].shape[1] < ids.shape[1]
    assert_same(model, before)
    assert torch.equal(logits(model), dense)


def test_a_call_whose_hooks_were_taken_off_is_dense() -> None:
    """torch reads a module's hooks before it calls them: one of them may come after detach."""
    model = tiny_model()
    before, dense = snapshot(model), logits(model)
    run = tr.reduce(model, "fastv", budget=0.8, layout=layout())
    late = next(hook for hook in model.model._forward_pre_hooks.values() if isinstance(hook, Hook))
    run.detach()
    model.model.register_forward_pre_hook(late, with_kwargs=True)
    assert torch.equal(logits(model), dense)
    model.model._forward_pre_hooks.clear()
    model.model._forward_pre_hooks_with_kwargs.clear()
    assert_same(model, before)


def broken_off(model: Any, error: type[BaseException]) -> None:
    """A forward in this thread that `error` ends, of which torch tells no hook."""

    def fail(*_: Any) -> None:
        raise error

    handle = model.model.layers[2].register_forward_hook(fail)
    with pytest.raises(error):
        logits(model)
    handle.remove()


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_detach_after_a_thread_was_broken_off_and_died(error: type[BaseException]) -> None:
    """What a dead thread held is void."""
    model = tiny_model()
    before = snapshot(model)
    run = tr.reduce(model, "fastv", budget=0.8, layout=layout())
    thread = threading.Thread(target=broken_off, args=(model, error))
    thread.start()
    thread.join(30)
    started = time.monotonic()
    run.detach()
    assert time.monotonic() - started < 10
    assert_same(model, before)


@pytest.mark.parametrize("remedy", ["forward", "detach"])
def test_detach_after_a_thread_of_a_pool_was_broken_off(remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread lives on, and nobody else can know that its forward does not: its next forward, or detach in it, says so."""
    monkeypatch.setattr(leases, "PATIENCE", 0.1)
    model = tiny_model()
    before = snapshot(model)
    with ThreadPoolExecutor(1) as pool:
        run = tr.reduce(model, "fastv", budget=0.8, layout=layout())
        expected = logits(model)
        pool.submit(broken_off, model, SystemExit).result()
        with pytest.raises(
            AttachError, match="pipeline fastv cannot be detached: a forward of another thread has not ended in"
        ):
            run.detach()
        assert run.attached
        if remedy == "forward":
            assert torch.equal(pool.submit(logits, model).result(), expected)
            run.detach()
        else:
            pool.submit(run.detach).result()
    assert not run.attached
    assert_same(model, before)


def test_detach_gives_up_on_a_forward_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has changed then: not for the forward that runs, and not for those that come."""
    monkeypatch.setattr(leases, "PATIENCE", 0.1)
    model = tiny_model()
    before = snapshot(model)
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    run = tr.reduce(model, "random", budget=0.8, layout=layout())
    expected = logits(model)
    handle = model.model.layers[2].register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1) as pool:
        forward = pool.submit(logits, model)
        assert inside.wait(30)
        with pytest.raises(AttachError, match=r"has not ended in 0 s; detach when it has ended"):
            run.detach()
        go_on.set()
        assert torch.equal(forward.result(30), expected)
    handle.remove()
    assert torch.equal(logits(model), expected)
    run.detach()
    assert_same(model, before)


def test_two_threads_detach_at_once() -> None:
    """And one of them attaches again: the other does not take that off."""
    model = tiny_model()
    before = snapshot(model)
    run = tr.reduce(model, "random", budget=0.8, layout=layout())
    at_once(lambda _: run.detach())
    assert not run.attached
    assert_same(model, before)


def test_waiting_reads_no_stack_of_another_thread_and_does_not_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: Any) -> None:
        inside.set()
        assert go_on.wait(30)

    def forbidden(*_: Any) -> None:
        raise AssertionError

    run = tr.reduce(model, "random", budget=0.8, layout=layout())
    handle = model.model.layers[2].register_forward_pre_hook(hold)
    looks = 0
    only_this_thread = leases.Leases._only_this_thread

    def counted(self: leases.Leases) -> bool:
        nonlocal looks
        looks += 1
        return only_this_thread(self)

    with ThreadPoolExecutor(2) as pool, monkeypatch.context() as patch:
        patch.setattr(sys, "_current_frames", forbidden)
        patch.setattr(leases.Leases, "_only_this_thread", counted)
        forward = pool.submit(logits, model)
        assert inside.wait(30)
        detaching = pool.submit(run.detach)
        with pytest.raises(TimeoutError):
            detaching.result(0.3)
        go_on.set()
        detaching.result(30)
        forward.result(30)
    handle.remove()
    assert looks == 2  # When it began, and when the forward had ended.
    assert not run.attached


def test_detach_within_a_forward_of_its_own() -> None:
    """It would leave the layers to come without what the layers before have done."""
    model = tiny_model()
    before = snapshot(model)
    with tr.reduce(model, "fastv", budget=0.8, layout=layout()) as run:
        expected = logits(model)
        handle = model.model.layers[2].register_forward_pre_hook(lambda *_: run.detach())
        with pytest.raises(AttachError, match="within a forward of its own model"):
            logits(model)
        handle.remove()
        assert torch.equal(logits(model), expected)
    assert_same(model, before)


def test_detach_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that begin anew as soon as they have ended wait while it detaches, and go on dense."""
    monkeypatch.setattr(leases, "PATIENCE", 20.0)
    model, stop = tiny_model(), threading.Event()
    before, dense = snapshot(model), logits(model)
    run = tr.reduce(model, "fastv", budget=0.8, layout=layout())
    reduced = logits(model)

    def work(number: int) -> bool:
        while not stop.is_set():
            out = logits(model)
            if not torch.equal(out, reduced) and not torch.equal(out, dense):
                return False
        return torch.equal(logits(model), dense)

    with ThreadPoolExecutor(8) as pool:
        threads = [pool.submit(work, number) for number in range(8)]
        time.sleep(0.2)
        try:
            run.detach()
        finally:
            stop.set()
        assert all(thread.result() for thread in threads)
    assert not run.attached
    assert_same(model, before)
