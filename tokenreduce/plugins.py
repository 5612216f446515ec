"""Finds strategies, adapters and presets: our own, and those of installed packages.

Our strategies and adapters come through the same hooks as a third party's. Origin means the name of the distribution
that offers something. What a third party brings and cannot be used is left out, with one warning that names it; whatever
it is, everything else goes on.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import pluggy
from torch import nn

from tokenreduce import hookspecs
from tokenreduce.adapter import FfnPair, ModelAdapter, VisionTower
from tokenreduce.errors import PluginError, call_plugin, one_line
from tokenreduce.hookspecs import PROJECT
from tokenreduce.layout import TokenLayout
from tokenreduce.strategy import SITE_ORDER, VISION_ORDER, Capabilities, StageConfig, Strategy
from tokenreduce.trace import StageTrace
from tokenreduce.vision import VisionStageConfig, VisionStrategy

DISABLE = "TOKENREDUCE_DISABLE_PLUGINS"
"""Environment variable: `1` turns all third-party plugins off, `name,name` those packages or entry points."""

T = TypeVar("T")
AnyStrategy = type[Strategy] | type[VisionStrategy]
"""A strategy class, for the decoder or for the vision tower."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class PluginWarning(UserWarning):
    """A plugin, or something that one offers, cannot be used and is left out."""


@dataclass(frozen=True)
class Offer(Generic[T]):
    """Something a plugin brings. origin: the distribution it comes from."""

    item: T
    origin: str


class Manager(pluggy.PluginManager):
    """Everything registered, what it offered, and what was left out."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(hookspecs)
        self.left_out: dict[str, str] = {}
        """Why something is left out, by what it is: a strategy's or preset's name, or a plugin's."""
        self.offered: dict[tuple[str, str], list[Any]] = {}
        """What a hook of a plugin returned, by the hook's and the plugin's name. Each is asked once."""
        self.told: set[str] = set()
        """Reasons that were warned of."""
        self.silent: set[pluggy.HookImpl] = set()
        """Observers that failed."""
        self.checked: dict[int, str | None] = {}
        """What is wrong with an offered class, None for nothing, by its id."""

    def leave_out(self, what: str, why: str) -> None:
        """Warn of it, the first time."""
        self.left_out[what] = why
        if why not in self.told:
            self.told.add(why)
            warnings.warn(f"{why}; it is left out", PluginWarning, stacklevel=2)


_LOADING = threading.RLock()
"""Held while code of plugins runs at import or in a hook that offers something."""


@cache
def manager() -> Manager:
    """The plugin manager with everything registered. `manager.cache_clear()` makes the next call look again.

    Warns about a plugin that cannot be imported, or whose hooks do not fit.
    """
    with _LOADING:
        found = Manager()
        _register(found, importlib.import_module("tokenreduce.strategies"), f"{PROJECT}:strategies")
        for entry in sorted(entry_points(group=PROJECT), key=lambda e: (_origin(e), e.name)):
            own = _origin(entry) == PROJECT
            if own or not _disabled(entry):
                module = _load(found, entry, must=own)
                if module is not None:
                    _register(found, module, f"{_origin(entry)}:{entry.name}")
        if not found.has_plugin(f"{PROJECT}:adapters"):  # a source tree that is not installed has no entry points
            _register(found, importlib.import_module("tokenreduce_adapters"), f"{PROJECT}:adapters")
        return found


def strategies() -> dict[str, AnyStrategy]:
    """Strategy classes by name. Left out with a warning: what breaks the contract, and what two plugins offer by one name."""
    return {name: offer.item for name, offer in offered_strategies().items()}


def adapters() -> list[type[ModelAdapter]]:
    """Adapter classes, third-party ones first, so that they can take over a family of ours."""
    offers = offered_adapters().values()
    return [offer.item for offer in sorted(offers, key=lambda offer: offer.origin == PROJECT)]


def presets() -> dict[str, Path]:
    """YAML files of named pipelines."""
    return {name: offer.item for name, offer in offered_presets().items()}


def why_left_out(name: str) -> str:
    """The end of a message about an unknown strategy or preset: why it is left out, "" if it was never offered."""
    why = manager().left_out.get(name)
    return "" if why is None else f", which is left out: {why}"


def offered_strategies() -> dict[str, Offer[AnyStrategy]]:
    """Strategies by name, in alphabetical order, with their origins."""
    found = [(cls.name, Offer(cls, origin)) for cls, origin in _usable("tokenreduce_strategies", _strategy_fault)]
    return _by_name("strategy", found)


def offered_adapters() -> dict[str, Offer[type[ModelAdapter]]]:
    """Adapters by name, in alphabetical order, with their origins."""
    found = [(cls.name, Offer(cls, origin)) for cls, origin in _usable("tokenreduce_adapters", _adapter_fault)]
    return _by_name("adapter", found)


def offered_presets() -> dict[str, Offer[Path]]:
    """Presets by name, in alphabetical order, with their origins."""
    named = [(path.stem, Offer(path, PROJECT)) for path in (Path(__file__).parent / "presets").glob("*.yaml")]
    offers = _usable("tokenreduce_presets", _preset_fault)
    return _by_name("preset", [*named, *((name, Offer(Path(path), origin)) for (name, path), origin in offers)])


def adapter_of(model: nn.Module) -> ModelAdapter | None:
    """The first adapter that matches `model`, a third party's before ours; None if there is none.

    A third party's whose constructor or `matches` fails is passed over, with a warning.
    """
    offers = sorted(offered_adapters().values(), key=lambda offer: offer.origin == PROJECT)
    for offer in offers:
        try:
            adapter = offer.item()
            if adapter.matches(model):
                return adapter if offer.origin == PROJECT else _guarded(adapter, offer.origin)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if offer.origin == PROJECT:
                raise
            name = offer.item.name
            manager().leave_out(name, _fault(offer.origin, f"adapter {name} fails: {one_line(error)}"))
    return None


def observe(event: StageTrace) -> None:
    """Tell the observers of an applied stage. One that fails is left out from then on, with a warning."""
    found = manager()
    for implementation in found.hook.tokenreduce_observe.get_hookimpls():
        if implementation in found.silent:
            continue
        try:
            implementation.function(**({"event": event} if implementation.argnames else {}))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            found.silent.add(implementation)
            name = implementation.plugin_name
            why = f"failed as an observer of stage {event.strategy} at {event.site}: {one_line(error)}"
            found.leave_out(name, _fault(name.partition(":")[0], why))


_ANSWERS: dict[str, tuple[type, bool]] = {
    "text_model": (nn.Module, False),
    "ffn_pair": (FfnPair, True),
    "layout": (TokenLayout, True),
    "vision_tower": (VisionTower, True),
}
"""What the methods of an adapter return, and whether they may return None."""


def _guarded(adapter: ModelAdapter, origin: str) -> ModelAdapter:
    """`adapter`, with methods that fail in one line which names it, and return what they should."""

    def guard(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        kind, optional = _ANSWERS[name]
        who = f"plugin '{origin}': adapter {adapter.name}: {name}()"

        def guarded(*arguments: Any) -> Any:
            answer = call_plugin(who, lambda: method(*arguments))
            if not (isinstance(answer, kind) or (optional and answer is None)):
                raise PluginError(f"{who} returned a {type(answer).__name__}, not a {kind.__name__}")
            return answer

        return guarded

    for name in _ANSWERS:
        setattr(adapter, name, guard(name, getattr(adapter, name)))
    return adapter


def _origin(entry: EntryPoint) -> str:
    return (entry.dist.name if entry.dist is not None else None) or entry.value


def _disabled(entry: EntryPoint) -> bool:
    wanted = {_normal(name) for name in os.environ.get(DISABLE, "").split(",")} - {"", "0", "false", "no"}
    return bool(wanted & {"1", "true", "yes", "all", _normal(_origin(entry)), _normal(entry.name)})


def _normal(name: str) -> str:
    """Distribution names compare without case, and `_` is `-`."""
    return re.sub(r"[-_.]+", "-", name.strip().lower())


def _load(found: Manager, entry: EntryPoint, *, must: bool) -> object | None:
    """What the entry point names; None after a warning if it cannot be imported."""
    try:
        with _quiet():
            return entry.load()  # type: ignore[no-any-return]
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if must:
            raise
        origin = _origin(entry)
        found.leave_out(origin, _fault(origin, f"cannot be imported ({entry.value}): {one_line(error)}"))
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """What a plugin prints here goes to stderr: stdout may be a JSON that somebody reads."""
    with redirect_stdout(sys.stderr):
        yield


def _fault(origin: str, why: str, after: str = " ") -> str:
    return f"plugin '{origin}'{after}{why}; mend it, uninstall it, or set {DISABLE}={origin}"


def _register(found: Manager, module: object, name: str) -> None:
    origin = name.partition(":")[0]
    try:
        if found.is_registered(module):
            return
        found.register(module, name)
        found.check_pending()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if origin == PROJECT:
            raise
        if found.get_plugin(name) is not None:
            found.unregister(name=name)
        found.leave_out(origin, _fault(origin, f"has hooks that do not fit: {one_line(error)}"))


def _usable(hook: str, fault: Callable[[Any], str | None]) -> Iterator[tuple[Any, str]]:
    """Each thing that a hook offers and that has no fault, with its origin."""
    found = manager()
    for item, origin in _collect(found, hook):
        wrong = found.checked.get(id(item), "") if isinstance(item, type) else ""
        if wrong == "":
            wrong = _told(fault, item)
            if isinstance(item, type):
                found.checked[id(item)] = wrong
        if wrong is None:
            yield item, origin
        elif origin == PROJECT:
            raise PluginError(wrong)
        else:
            found.leave_out(_text(item, "name") or origin, _fault(origin, wrong, ": "))


def _told(fault: Callable[[Any], str | None], item: Any) -> str | None:
    """What `fault` says of `item`, or that its own code fails when it is looked at."""
    try:
        with _LOADING, _quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return fault(item)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return f"{_label(item)} cannot be checked: {one_line(error)}"


def _collect(found: Manager, hook: str) -> Iterator[tuple[Any, str]]:
    """Each thing that a hook offers, with its origin. A hook that fails is left out with a warning."""
    caller: pluggy.HookCaller = getattr(found.hook, hook)
    for implementation in sorted(caller.get_hookimpls(), key=lambda each: each.plugin_name):
        origin = implementation.plugin_name.partition(":")[0]
        key = (hook, implementation.plugin_name)
        with _LOADING:
            if key not in found.offered:
                found.offered[key] = _call(found, implementation.function, hook, origin)
        for item in found.offered[key]:
            yield item, origin


def _call(found: Manager, function: Callable[[], Any], hook: str, origin: str) -> list[Any]:
    """What a hook offers: the items of its list, or of its dict of presets."""
    kind = dict if hook == "tokenreduce_presets" else list
    try:
        with _quiet():
            offered = function()
            if isinstance(offered, kind):
                return list(offered.items() if isinstance(offered, dict) else offered)
        why = f"must return a {kind.__name__} from {hook}, got {type(offered).__name__}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if origin == PROJECT:
            raise
        why = f"fails in {hook}: {one_line(error)}"
    found.leave_out(f"{origin} {hook}", _fault(origin, why))
    return []


def _by_name(kind: str, named: list[tuple[str, Offer[T]]]) -> dict[str, Offer[T]]:
    """A dict of offers. Of two with one name ours stays; of two third parties' neither does. A warning names both."""
    found: dict[str, list[Offer[T]]] = {}
    for name, offer in sorted(named, key=lambda pair: pair[0]):
        found.setdefault(name, []).append(offer)
    for name, offers in list(found.items()):
        if len(offers) == 1:
            continue
        origins = " and ".join(f"'{offer.origin}'" for offer in offers)
        found[name] = [offer for offer in offers if offer.origin == PROJECT]
        manager().leave_out(
            name if not found[name] else f"{kind} {name} {origins}",
            f"two plugins offer a {kind} '{name}': {origins}; uninstall one, or set {DISABLE} to the name of one"
            + (f" (the one of {PROJECT} is used)" if found[name] else ""),
        )
    return {name: offers[0] for name, offers in found.items() if offers}


def _label(item: Any) -> str:
    return _text(item, "__name__") or f"a {type(item).__name__}"


def _text(item: Any, attribute: str) -> str:
    """An attribute that is text, "" where it is none or looking at it fails."""
    try:
        value = getattr(item, attribute, "")
    except Exception:
        return ""
    return value if isinstance(value, str) else ""


def _strategy_fault(cls: Any) -> str | None:
    """What is wrong with a strategy, by the contract of tokenreduce.strategy or tokenreduce.vision."""
    label = _text(cls, "__name__") or repr(cls)
    if not (inspect.isclass(cls) and issubclass(cls, (Strategy, VisionStrategy))):
        return f"{label} is not a subclass of tokenreduce.strategy.Strategy (nor of tokenreduce.vision.VisionStrategy)"
    vision = issubclass(cls, VisionStrategy)
    sites: tuple[str, ...] = VISION_ORDER if vision else SITE_ORDER
    base = VisionStageConfig if vision else StageConfig
    name, config = getattr(cls, "name", None), getattr(cls, "Config", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"{label}.name must be lower case letters, digits and _, got {name!r}"
    capabilities = getattr(cls, "capabilities", None)
    if (
        not isinstance(capabilities, Capabilities)
        or not capabilities.sites
        or set(capabilities.sites) - set(sites)
        or (vision and len(capabilities.sites) > 1)
    ):
        how_many = "one site" if vision else "sites"
        return f"{label}.capabilities must be a Capabilities with {how_many} out of {', '.join(sites)}"
    if not (inspect.isclass(config) and issubclass(config, base) and config is not base):
        return f"{label}.Config must be a subclass of {base.__module__}.{base.__name__}"
    if config.model_config.get("extra") != "forbid":
        return f"{label}.Config must forbid unknown fields (extra='forbid')"
    pinned = config.model_fields["strategy"].annotation
    if get_origin(pinned) is not Literal or get_args(pinned) != (name,):
        return f"{label}.Config needs the field `strategy: Literal['{name}'] = '{name}'`"
    if inspect.isabstract(cls):
        return f"{label} does not define {', '.join(sorted(cls.__abstractmethods__))}"
    try:
        schema = config.model_json_schema()
        json.dumps(schema, allow_nan=False)
    except Exception as error:
        return f"{label}.Config has no JSON Schema ({one_line(error)})"
    for field, info in config.model_fields.items():
        if "default" not in schema["properties"].get(info.alias or field, {}) and not (
            info.is_required() or info.default_factory is not None
        ):
            return f"{label}.Config.{field}: its default {info.default!r:.60} cannot be written as JSON"
    return None


def _adapter_fault(cls: Any) -> str | None:
    """What is wrong with an adapter."""
    label = _text(cls, "__name__") or repr(cls)
    if not (inspect.isclass(cls) and issubclass(cls, ModelAdapter)):
        return f"{label} is not a subclass of tokenreduce.adapter.ModelAdapter"
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"{label}.name must be lower case letters, digits and _, got {name!r}"
    for field in ("model_types", "checkpoints"):
        value = getattr(cls, field, None)
        if not isinstance(value, (list, tuple)) or not all(isinstance(each, str) for each in value):
            return f"{label}.{field} must be a tuple of texts, got {value!r:.60}"
    if not isinstance(getattr(cls, "notes", None), str):
        return f"{label}.notes must be text, got {getattr(cls, 'notes', None)!r:.60}"
    return None


def _preset_fault(offer: Any) -> str | None:
    """What is wrong with a pair of a preset's name and path."""
    name, path = offer
    if not isinstance(name, str) or not name or not isinstance(path, (str, Path)):
        return f"tokenreduce_presets must map names to paths, got {name!r:.60}: {path!r:.60}"
    return None
