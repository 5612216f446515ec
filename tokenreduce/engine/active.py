"""The forwards of an attachment that go on, and what is on the model only while they do."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from tokenreduce.adapter import FfnPair
from tokenreduce.engine.cache.layers import running
from tokenreduce.engine.compiled.layer_hooks import TracedHooks
from tokenreduce.engine.compiled.state import CompiledForward
from tokenreduce.engine.forward.decode_step import DecodeStep
from tokenreduce.engine.forward.layer_hooks import LayerHooks
from tokenreduce.engine.forward.state import Forward
from tokenreduce.engine.model.host import Host


class ActiveForwards:
    """At most one forward in each thread. The layers' hooks are on while one of them needs them."""

    lock: threading.Lock
    """Held while a forward is added or goes, together with the hooks in the layers."""
    layer_hooks: LayerHooks
    """For forwards that are not compiled."""
    traced_hooks: TracedHooks
    """For those that are."""

    def __init__(self, host: Host, pairs: Mapping[int, FfnPair]) -> None:
        self.lock = threading.Lock()
        self.layer_hooks = LayerHooks(host.layers, pairs, self.reducing, host.family)
        self.traced_hooks = TracedHooks(host.layers, pairs)
        self._forwards: dict[int, Forward | DecodeStep] = {}

    def current(self) -> Forward | DecodeStep | None:
        """The one of this thread. At nearly every token there is none in any."""
        return self._forwards.get(threading.get_ident()) if self._forwards else None

    def reducing(self) -> Forward | None:
        """The one of this thread, if the hooks of uncompiled layers are for it."""
        forward = self.current()
        if not isinstance(forward, Forward) or isinstance(forward, CompiledForward):
            return None
        return forward if forward.sequences else None

    def start(self, forward: Forward | DecodeStep) -> None:
        """`forward` begins in this thread. In one step, so that a thread that ends here cannot take the hooks off in between."""
        with self.lock:
            self._forwards[threading.get_ident()] = forward
            if forward.sequences:
                (self.traced_hooks if isinstance(forward, CompiledForward) else self.layer_hooks).install()
        forward.outer, running.forward = running.forward, forward

    def end(self) -> Forward | DecodeStep:
        """The one of this thread has ended, or was broken off."""
        with self.lock:
            forward = self._forwards.pop(threading.get_ident())
            forward.over = True
            running.forward = None if forward.outer is None or forward.outer.over else forward.outer
            if not any(other.sequences for other in self._forwards.values()):
                self._remove_hooks()
            return forward

    def forget(self) -> None:
        """Forget all of them: none goes on, those that are left were broken off, in this thread or in one that is dead."""
        with self.lock:
            if running.forward in self._forwards.values():
                running.forward = None
            for forward in self._forwards.values():
                forward.over = True
                forward.undo()
            self._forwards.clear()
            self._remove_hooks()

    def _remove_hooks(self) -> None:
        self.layer_hooks.remove()
        self.traced_hooks.remove()
