"""Finds strategies, adapters and presets: our own, and those of installed packages.

Our strategies and adapters come through the same hooks as a third party's. Origin means the name of the distribution
that offers something.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args, get_origin

import pluggy

from tokenreduce import hookspecs
from tokenreduce.adapter import ModelAdapter
from tokenreduce.errors import PluginError, one_line
from tokenreduce.hookspecs import PROJECT
from tokenreduce.strategy import SITE_ORDER, VISION_ORDER, Capabilities, StageConfig, Strategy
from tokenreduce.vision import VisionStageConfig, VisionStrategy

DISABLE = "TOKENREDUCE_DISABLE_PLUGINS"
"""Environment variable: `1` turns all third-party plugins off, `name,name` those packages or entry points."""

T = TypeVar("T")
AnyStrategy = type[Strategy] | type[VisionStrategy]
"""A strategy class, for the decoder or for the vision tower."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")


class PluginWarning(UserWarning):
    """A plugin could not be loaded and is left out."""


@dataclass(frozen=True)
class Offer(Generic[T]):
    """Something a plugin brings. origin: the distribution it comes from."""

    item: T
    origin: str


@cache
def manager() -> pluggy.PluginManager:
    """The plugin manager with everything registered. `manager.cache_clear()` makes the next call look again.

    Warns about a plugin that cannot be imported; raises PluginError for one whose hooks do not fit.
    """
    found = pluggy.PluginManager(PROJECT)
    found.add_hookspecs(hookspecs)
    _register(found, importlib.import_module("tokenreduce.strategies"), f"{PROJECT}:strategies")
    for entry in sorted(entry_points(group=PROJECT), key=lambda e: (_origin(e), e.name)):
        own = _origin(entry) == PROJECT
        if own or not _disabled(entry):
            module = _load(entry, must=own)
            if module is not None:
                _register(found, module, f"{_origin(entry)}:{entry.name}")
    if not found.has_plugin(f"{PROJECT}:adapters"):  # a source tree that is not installed has no entry points
        _register(found, importlib.import_module("tokenreduce_adapters"), f"{PROJECT}:adapters")
    return found


def strategies() -> dict[str, AnyStrategy]:
    """Strategy classes by name. Raises PluginError for two of one name or one that breaks the contract."""
    return {name: offer.item for name, offer in offered_strategies().items()}


def adapters() -> list[type[ModelAdapter]]:
    """Adapter classes, third-party ones first, so that they can take over a family of ours."""
    offers = offered_adapters().values()
    return [offer.item for offer in sorted(offers, key=lambda offer: offer.origin == PROJECT)]


def presets() -> dict[str, Path]:
    """YAML files of named pipelines."""
    return {name: offer.item for name, offer in offered_presets().items()}


def offered_strategies() -> dict[str, Offer[AnyStrategy]]:
    """Strategies by name, in alphabetical order, with their origins."""
    offers = [Offer(_checked_strategy(cls, origin), origin) for cls, origin in _collect("tokenreduce_strategies", list)]
    return _by_name("strategy", [(offer.item.name, offer) for offer in offers])


def offered_adapters() -> dict[str, Offer[type[ModelAdapter]]]:
    """Adapters by name, in alphabetical order, with their origins."""
    offers = [Offer(_checked_adapter(cls, origin), origin) for cls, origin in _collect("tokenreduce_adapters", list)]
    return _by_name("adapter", [(offer.item.name, offer) for offer in offers])


def offered_presets() -> dict[str, Offer[Path]]:
    """Presets by name, in alphabetical order, with their origins."""
    named = [(path.stem, Offer(path, PROJECT)) for path in (Path(__file__).parent / "presets").glob("*.yaml")]
    for (name, path), origin in _collect("tokenreduce_presets", dict):
        if not isinstance(name, str) or not isinstance(path, (str, Path)):
            raise _broken(origin, f"tokenreduce_presets must map names to paths, got {name!r}: {path!r}")
        named.append((name, Offer(Path(path), origin)))
    return _by_name("preset", named)


def _origin(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.module


def _disabled(entry: EntryPoint) -> bool:
    wanted = {_normal(name) for name in os.environ.get(DISABLE, "").split(",")} - {"", "0", "false", "no"}
    return bool(wanted & {"1", "true", "yes", "all", _normal(_origin(entry)), _normal(entry.name)})


def _normal(name: str) -> str:
    """Distribution names compare without case, and `_` is `-`."""
    return re.sub(r"[-_.]+", "-", name.strip().lower())


def _load(entry: EntryPoint, *, must: bool) -> object | None:
    """What the entry point names; None after a warning if it cannot be imported."""
    try:
        return entry.load()  # type: ignore[no-any-return]
    except (Exception, SystemExit) as error:
        if must:
            raise
        _warn(_origin(entry), f"cannot be imported ({entry.value})", error)
        return None


def _warn(origin: str, what: str, error: BaseException) -> None:
    warnings.warn(f"plugin '{origin}' {what} and is left out: {one_line(error)}", PluginWarning, stacklevel=3)


def _register(found: pluggy.PluginManager, module: object, name: str) -> None:
    if found.is_registered(module):
        return
    origin = name.partition(":")[0]
    try:
        found.register(module, name)
        found.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise _broken(origin, " ".join(str(error).split())) from None


def _broken(origin: str, why: str) -> PluginError:
    return PluginError(f"plugin '{origin}': {why}; mend it, uninstall it, or set {DISABLE}={origin}")


def _collect(hook: str, kind: type[list[Any]] | type[dict[str, Any]]) -> Iterator[tuple[Any, str]]:
    """Each thing that a hook offers, with its origin. A hook that raises is left out with a warning."""
    caller: pluggy.HookCaller = getattr(manager().hook, hook)
    for implementation in sorted(caller.get_hookimpls(), key=lambda each: each.plugin_name):
        origin = implementation.plugin_name.partition(":")[0]
        offered = _call(implementation.function, hook, origin)
        if not isinstance(offered, kind):
            raise _broken(origin, f"{hook} must return a {kind.__name__}, got {type(offered).__name__}")
        for item in offered.items() if isinstance(offered, dict) else offered:
            yield item, origin


def _call(function: Callable[[], Any], hook: str, origin: str) -> Any:
    try:
        return function()
    except Exception as error:
        if origin == PROJECT:
            raise
        _warn(origin, f"fails in {hook}", error)
        return {} if hook == "tokenreduce_presets" else []


def _by_name(kind: str, named: list[tuple[str, Offer[T]]]) -> dict[str, Offer[T]]:
    """A dict of offers; PluginError naming both origins if two have one name."""
    found: dict[str, Offer[T]] = {}
    for name, offer in sorted(named, key=lambda pair: pair[0]):
        if name in found:
            raise PluginError(
                f"two plugins offer a {kind} '{name}': '{found[name].origin}' and '{offer.origin}'; "
                f"uninstall one, or set {DISABLE} to the name of one"
            )
        found[name] = offer
    return found


def _checked_strategy(cls: Any, origin: str) -> AnyStrategy:
    """`cls`, if it is a strategy that keeps the contract of tokenreduce.strategy or tokenreduce.vision."""
    label = getattr(cls, "__name__", repr(cls))
    if not (inspect.isclass(cls) and issubclass(cls, (Strategy, VisionStrategy))):
        raise _broken(
            origin,
            f"{label} is not a subclass of tokenreduce.strategy.Strategy (nor of tokenreduce.vision.VisionStrategy)",
        )
    vision = issubclass(cls, VisionStrategy)
    sites: tuple[str, ...] = VISION_ORDER if vision else SITE_ORDER
    base = VisionStageConfig if vision else StageConfig
    name, config = getattr(cls, "name", None), getattr(cls, "Config", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _broken(origin, f"{label}.name must be lower case letters, digits and _, got {name!r}")
    capabilities = getattr(cls, "capabilities", None)
    if (
        not isinstance(capabilities, Capabilities)
        or not capabilities.sites
        or set(capabilities.sites) - set(sites)
        or (vision and len(capabilities.sites) > 1)
    ):
        how_many = "one site" if vision else "sites"
        raise _broken(origin, f"{label}.capabilities must be a Capabilities with {how_many} out of {', '.join(sites)}")
    if not (inspect.isclass(config) and issubclass(config, base) and config is not base):
        raise _broken(origin, f"{label}.Config must be a subclass of {base.__module__}.{base.__name__}")
    if config.model_config.get("extra") != "forbid":
        raise _broken(origin, f"{label}.Config must forbid unknown fields (extra='forbid')")
    pinned = config.model_fields["strategy"].annotation
    if get_origin(pinned) is not Literal or get_args(pinned) != (name,):
        raise _broken(origin, f"{label}.Config needs the field `strategy: Literal['{name}'] = '{name}'`")
    if inspect.isabstract(cls):
        raise _broken(origin, f"{label} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    return cls


def _checked_adapter(cls: Any, origin: str) -> type[ModelAdapter]:
    """`cls`, if it is an adapter with a name."""
    label = getattr(cls, "__name__", repr(cls))
    if not (inspect.isclass(cls) and issubclass(cls, ModelAdapter)):
        raise _broken(origin, f"{label} is not a subclass of tokenreduce.adapter.ModelAdapter")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise _broken(origin, f"{label}.name must be lower case letters, digits and _, got {name!r}")
    return cls
