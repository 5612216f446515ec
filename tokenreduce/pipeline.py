"""A pipeline: which strategies act, in which order, under which budget. YAML in and out, JSON Schema, presets."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from tokenreduce import plugins
from tokenreduce.budget import Budget, is_share
from tokenreduce.config.json_source import exists
from tokenreduce.config.problems import KnownFields, describe, problem
from tokenreduce.config.versions import PIPELINE, too_new
from tokenreduce.config.yaml_source import MAX_DEPTH, MAX_NODES, Loc, Source, is_text, read_yaml, short, write_yaml
from tokenreduce.errors import BudgetError, PipelineError, TokenReduceError, call_plugin, nearest, one_line
from tokenreduce.layout import MarkerPolicy
from tokenreduce.strategy import VISION_ORDER, AnyStageConfig, Strategy
from tokenreduce.trace import html_table
from tokenreduce.vision import VisionStrategy


def _budget(value: Any) -> Any:
    """A Budget from a share or a mapping of a unit; None stays None."""
    if value is None or isinstance(value, Budget):
        return value
    try:
        return Budget.model_validate(value, strict=True) if isinstance(value, dict) else Budget.parse(value)
    except BudgetError as error:
        raise problem((), str(error).removeprefix("budget "), value) from None


def _stage(value: Any) -> AnyStageConfig:
    """The config of the strategy that `value` names. As strict as JSON: 1 is a number, "1" and true are not."""
    if not isinstance(value, (dict, AnyStageConfig)):
        raise problem((), f"expected a mapping with `strategy`, got {short(value)}", value)
    name = value.strategy if isinstance(value, AnyStageConfig) else value.get("strategy")
    known = plugins.strategies()
    if name is None:
        raise problem((), f"the field 'strategy' is missing; it names one of {', '.join(known)}", value)
    if not isinstance(name, str) or name not in known:
        why = plugins.why_left_out(name) if isinstance(name, str) else ""
        raise problem(("strategy",), f"unknown strategy {short(name)}{why or nearest(str(name), known)}", name)
    cls = known[name]
    config = value
    if not isinstance(value, AnyStageConfig):
        try:
            config = cls.Config.model_validate_json(json.dumps(value), strict=True)
        except ValidationError:
            raise
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise problem((), f"{name}: a validator of its Config failed: {one_line(error)}", value) from None
    if not isinstance(config, cls.Config):
        raise problem((), f"expected {cls.__name__}.Config for strategy '{name}', got {type(config).__name__}", value)
    if config.site is not None and config.site not in cls.capabilities.sites:
        sites = ", ".join(cls.capabilities.sites)
        raise problem(("site",), f"{name} cannot act at '{config.site}'; it can at: {sites}", config.site)
    try:
        _made(cls, config)
    except TokenReduceError as error:
        raise problem((), str(error), value) from None
    return config


_Share = Annotated[
    float, Field(gt=0, le=1, description="Share of the input's tokens that remains, as a mean over layers.")
]


class Pipeline(BaseModel):
    """A method of token reduction: its stages in the order in which they act, and what may remain."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(
        "pipeline",
        pattern=r"^\w[\w .,()+=%-]*$",
        max_length=80,
        description="What tables, plots and output folders call the pipeline.",
    )
    version: int = Field(PIPELINE, ge=1, le=PIPELINE, description="Of the meaning of all other fields.")
    description: str = Field("", description="What it does, in a line.")
    source: str = Field("", description="Where the method was published: paper, section, table.")
    budget: Annotated[Budget | None, BeforeValidator(_budget, json_schema_input_type=_Share | Budget | None)] = Field(
        None,
        description="What may remain: a share of the tokens such as 0.3, or one of `tokens`, `flops`, `kv_cache`. "
        "Without it, each stage must say itself how much it keeps.",
    )
    on_infeasible: Literal["refuse", "least"] = Field(
        "refuse",
        description="Where an input cannot meet the budget: `refuse` it, or go as low as possible and say so (`least`).",
    )
    newlines: MarkerPolicy = Field(
        "merge", description="Learned separator embeddings between rows of patches: `merge` treats them like patches."
    )
    wrappers: MarkerPolicy = Field(
        "protect", description="Special tokens around a frame that have a slot in it: `protect` leaves them alone."
    )
    stages: list[Annotated[SerializeAsAny[AnyStageConfig], BeforeValidator(_stage)]] = Field(
        description="Stages in the order in which they act. An empty list keeps every token."
    )

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        _check_plain(value)
        wrong = too_new(value["version"], PIPELINE) if isinstance(value, dict) and "version" in value else ""
        if wrong:  # Before the fields of which a newer version may have others.
            raise problem(("version",), wrong, value["version"])
        return value

    @model_validator(mode="after")
    def _tower_first(self) -> Pipeline:
        """Stages are listed in the order in which they act, and frames pass the tower before tokens pass the decoder."""
        known = plugins.strategies()
        latest = 0
        for place, stage in enumerate(self.stages):
            order = _order(known[stage.strategy])
            if order < latest:
                raise problem(
                    ("stages", place, "strategy"),
                    f"{stage.strategy} acts at {known[stage.strategy].capabilities.sites[0]}, before "
                    f"{self.stages[place - 1].strategy}; list the stages in the order in which they act",
                    stage.strategy,
                )
            latest = order
        return self

    def with_budget(self, budget: Any) -> Pipeline:
        """The same pipeline under another budget: a share in (0, 1], a mapping, or a Budget.

        A bare share replaces the number alone where the pipeline's budget is a share of tokens, so that what the share is of
        and how it is rounded stay the method's. Raises BudgetError.
        """
        asked, own = Budget.parse(budget), self.budget
        if is_share(budget) and own is not None and own.tokens is not None and own.relative:
            asked = own.model_copy(update={"tokens": asked.tokens})
        return self.model_copy(update={"budget": asked})

    def where_infeasible(self, choice: str) -> Pipeline:
        """The same pipeline that does `choice`, `refuse` or `least`, where a budget cannot be met. PipelineError for others."""
        if choice not in ("refuse", "least"):
            raise PipelineError(f"on_infeasible: expected refuse or least, got {short(choice)}")
        return self.model_copy(update={"on_infeasible": choice})

    def __repr__(self) -> str:
        stages = " → ".join(_brief(stage) for stage in self.stages) or "no stages"
        return f"<Pipeline {self.name}, budget {self.budget or 'none'}: {stages}>"

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        rows = [
            (place, stage.strategy, _said(stage) or "as by default") for place, stage in enumerate(self.stages, start=1)
        ]
        lines = [f"pipeline {self.name}, budget {self.budget or 'none'}", self.description, self.source]
        head = "".join(f"<p>{escape(line)}</p>" for line in lines if line)
        return head + html_table(["", "stage", "fields"], rows)

    def to_yaml(self) -> str:
        """YAML that `load_pipeline` takes for the same pipeline. Fields at their defaults are left out."""
        data = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        stages = [
            {
                "strategy": stage.strategy,
                **call_plugin(
                    f"strategy {stage.strategy}: its Config",
                    partial(stage.model_dump, mode="json", by_alias=True, exclude_defaults=True),
                ),
            }
            for stage in self.stages
        ]
        return write_yaml({"name": self.name, **data, "stages": stages})


def _said(stage: AnyStageConfig) -> str:
    """The fields of a stage that are not at their defaults."""
    fields = stage.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return ", ".join(f"{name}: {value}" for name, value in fields.items() if name != "strategy")


def _brief(stage: AnyStageConfig) -> str:
    said = _said(stage)
    return f"{stage.strategy} ({said})" if said else stage.strategy


def load_pipeline(source: str | Path | Mapping[str, Any] | Pipeline) -> Pipeline:
    """A pipeline from the name of a preset, the path of a YAML file, or a mapping.

    Raises PipelineError: one line with file, line, column, field, what was expected and the nearest known name.
    """
    if isinstance(source, Pipeline):
        return source
    opened = _open(source)
    try:
        return Pipeline.model_validate(opened.data)
    except ValidationError as error:
        lines = describe(error, opened, _known_fields(opened))
        more = f" (the first of {len(lines)} problems)" if len(lines) > 1 else ""
        raise PipelineError(lines[0] + more) from None


def pipeline_problems(source: str | Path | Mapping[str, Any]) -> list[str]:
    """Everything that is wrong with a pipeline, one line each; empty if it is valid."""
    try:
        opened = _open(source)
        Pipeline.model_validate(opened.data)
    except PipelineError as error:
        return [str(error)]
    except ValidationError as error:
        return describe(error, opened, _known_fields(opened))
    return []


def build(pipeline: Pipeline) -> list[Strategy]:
    """One strategy per stage in the decoder, in order."""
    return [strategy for strategy in _built(pipeline) if isinstance(strategy, Strategy)]


def build_vision(pipeline: Pipeline) -> list[VisionStrategy]:
    """One strategy per stage in the vision tower, in order."""
    return [strategy for strategy in _built(pipeline) if isinstance(strategy, VisionStrategy)]


def _built(pipeline: Pipeline) -> list[Strategy | VisionStrategy]:
    known, built = plugins.strategies(), []
    for place, stage in enumerate(pipeline.stages):
        strategy = _made(known[stage.strategy], stage)
        strategy.place = place
        built.append(strategy)
    return built


def _made(cls: plugins.AnyStrategy, config: AnyStageConfig) -> Strategy | VisionStrategy:
    return call_plugin(f"strategy {cls.name}: its constructor", lambda: cls(config))  # type: ignore[arg-type]


def _order(cls: plugins.AnyStrategy) -> int:
    """Where a strategy acts: 0 before the vision tower, 1 inside it, 2 in the decoder."""
    return 2 if issubclass(cls, Strategy) else VISION_ORDER.index(cls.capabilities.sites[0])  # type: ignore[arg-type]


def first_line(cls: type) -> str:
    """The first line of a class's docstring, "" where it has none."""
    text = cls.__doc__
    return text.strip().partition("\n")[0] if isinstance(text, str) else ""


def pipeline_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a pipeline, with the stages of every installed strategy."""
    schema = Pipeline.model_json_schema()
    definitions: dict[str, Any] = schema.setdefault("$defs", {})
    definitions.pop("AnyStageConfig", None)
    for name, cls in plugins.strategies().items():
        stage = cls.Config.model_json_schema(ref_template=f"#/$defs/{name}/$defs/{{model}}")
        stage["title"] = name
        stage["description"] = first_line(cls) or name
        stage["required"] = ["strategy", *(field for field in stage.get("required", []) if field != "strategy")]
        sites = [{"type": "null"}, {"type": "string", "enum": list(cls.capabilities.sites)}]
        stage["properties"]["site"] = {**stage["properties"]["site"], "anyOf": sites}
        definitions[name] = stage
    schema["properties"]["stages"]["items"] = {
        "oneOf": [{"$ref": f"#/$defs/{name}"} for name in plugins.strategies()],
        "discriminator": {"propertyName": "strategy"},
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _open(source: str | Path | Mapping[str, Any]) -> Source:
    """The data behind `source`, not yet validated."""
    if isinstance(source, Mapping):
        return Source(dict(source), "pipeline")
    if not isinstance(source, (str, Path)):
        raise PipelineError(f"expected a preset name, a YAML path or a mapping, got {short(source)}")
    presets = plugins.presets()
    if isinstance(source, str) and source in presets:
        return _mapping(read_yaml(presets[source]))
    is_path = isinstance(source, Path) or source.endswith((".yaml", ".yml")) or "/" in source or exists(source)
    if not is_path:
        if source in plugins.strategies():
            raise PipelineError(_a_strategy(source))
        why = plugins.why_left_out(str(source))
        raise PipelineError(f"no preset and no file is called {short(source)}{why or nearest(str(source), presets)}")
    return _mapping(read_yaml(Path(source)))


def _a_strategy(name: str) -> str:
    """What to say where the name of a strategy stands for a pipeline."""
    using = []
    for preset, path in plugins.presets().items():
        try:
            stages = load_pipeline(path).stages
        except PipelineError:  # A plugin's; whoever names it is told.
            continue
        using += [preset] if any(stage.strategy == name for stage in stages) else []
    presets = f"presets with it: {', '.join(using)}; or " if using else ""
    return (
        f"'{name}' is a strategy; a pipeline is a list of them. Use {presets}a YAML file with the lines "
        f"`name: mine`, `budget: 0.3`, `stages: [{{strategy: {name}}}]`"
    )


def _mapping(source: Source) -> Source:
    if not isinstance(source.data, dict):
        got = short(source.data)
        raise PipelineError(f"{source.place(())}: expected a mapping with `name` and `stages`, got {got}")
    return source


def _known_fields(source: Source) -> KnownFields:
    """Names of the fields that a mapping in the pipeline may have, by its place; none where that is not known."""

    def known(loc: Loc) -> list[str]:
        match loc:
            case ():
                return list(Pipeline.model_fields)
            case ("budget",):
                return list(Budget.model_fields)
            case ("stages", int(index)):
                cls = plugins.strategies()[source.data["stages"][index]["strategy"]]
                return [field.alias or name for name, field in cls.Config.model_fields.items()]
            case _:
                return []

    return known


def _check_plain(data: Any) -> None:
    """Refuse what YAML and JSON cannot say: NaN, infinities, keys that are not text, other objects, endless nesting."""
    todo: list[tuple[Loc, Any]] = [((), data)]
    seen = 0
    while todo:
        loc, value = todo.pop()
        seen += 1
        if len(loc) > MAX_DEPTH or seen > MAX_NODES:
            raise problem((), f"nested deeper than {MAX_DEPTH} levels or more than {MAX_NODES} values", None)
        if isinstance(value, dict):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise problem(loc, f"a key must be text, got {short(odd[0])}", value)
            todo += [((*loc, key), item) for key, item in value.items()]
        elif isinstance(value, (list, tuple)):
            todo += [((*loc, index), item) for index, item in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise problem(loc, f"expected a finite number, got {value}", value)
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise problem(loc, "expected a number of at most 64 bits", None)
        elif isinstance(value, str) and not is_text(value):
            raise problem(loc, f"{short(value)} is not valid Unicode text", value)
        elif not (value is None or isinstance(value, (str, float, int)) or _is_model(loc, value)):
            raise problem(loc, f"expected plain data, got {type(value).__name__}", None)


def _is_model(loc: Loc, value: object) -> bool:
    """Whether `value` is a Budget or a stage's config in the place of one."""
    if loc == ("budget",):
        return isinstance(value, Budget)
    return isinstance(value, AnyStageConfig) and len(loc) == 2 and loc[0] == "stages"
