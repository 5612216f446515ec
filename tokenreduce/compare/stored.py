"""What the files in a comparison's folder hold, held to its types when they are read: a hand or a disk may have damaged them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Number = Annotated[float, Field(allow_inf_nan=False, ge=-(2**62), le=2**62)]
Count = Annotated[int, Field(ge=0, le=2**62)]


class _Stored(BaseModel):
    """Other fields are let pass: a newer version may have written them."""

    model_config = ConfigDict(extra="allow", strict=True)


class StoredArm(_Stored):
    """An arm in settings.json."""

    name: str = Field(min_length=1)
    method: str = ""
    model: str
    pipeline: str | None = None


class StoredSettings(_Stored):
    """settings.json, as far as a folder is read by it."""

    arms: list[StoredArm] = Field(min_length=1)
    seed: Count = 0
    examples: Count = 0
    baseline: str = ""
    new_tokens: Count = 0
    task: dict[str, Any] = {}
    models: dict[str, str] = {}
    code: dict[str, str] | None = None
    environment: dict[str, str] | None = None
    files: dict[str, dict[str, str]] | None = None

    @model_validator(mode="after")
    def _names(self) -> StoredSettings:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have one name")
        return self


class ReportedSettings(StoredSettings):
    """settings.json, as a report needs it."""

    tokenreduce: str
    seed: Count
    examples: Count
    baseline: str
    new_tokens: Count
    task: dict[str, Any]
    models: dict[str, str]

    @model_validator(mode="after")
    def _tested(self) -> ReportedSettings:
        if self.baseline not in [arm.name for arm in self.arms]:
            raise ValueError(f"baseline {self.baseline!r:.60} is none of the arms")
        if not isinstance(self.task.get("task"), str) or not isinstance(self.task.get("positions", []), list):
            raise ValueError("task: expected its name under 'task', and a list under 'positions'")
        return self


class Seconds(_Stored):
    """Times of a row."""

    vision: Number
    prefill: Number
    selector: Number
    turns: Number
    decode_per_token: Number | None


class StoredRow(_Stored):
    """A line of results.jsonl, as a report needs it."""

    model: str
    index: Count
    arm: str
    id: str
    question: str = ""
    reply: str = ""
    worker: str = ""
    ran_on: str = ""
    said: str
    expected: str
    right: bool
    fired: bool
    finite: bool = True
    agrees: bool | None
    kl: Number | None
    chance: Number | None
    cell: dict[str, Number]
    tokens: list[Count] = Field(min_length=1)
    layer_flops: list[Number] = Field(min_length=1)
    relative_tokens: Number
    relative_flops: Number
    flops: Number
    selector_flops: Number
    kv_bytes: Number
    input_tokens: Number
    new_tokens: Number
    seconds: Seconds
    peak_bytes: Number | None = None
    growth_bytes: Number | None = None


class StoredCheck(_Stored):
    """A check in checks.json."""

    name: str
    subject: str
    passed: bool | None
    detail: str


class StoredStrip(_Stored):
    """A strip of frames in a picture."""

    arm: str
    png: str = Field(pattern=r"^[A-Za-z0-9+/]*=*$")
    reply: str | None = None
    right: bool | None = None
    kept: Count | None = None
    merged: Count | None = None
    dropped: Count | None = None

    @model_validator(mode="after")
    def _whole(self) -> StoredStrip:
        if self.arm != "input" and None in (self.reply, self.right, self.kept, self.merged, self.dropped):
            raise ValueError("a strip of an arm needs reply, right, kept, merged and dropped")
        return self


class StoredPicture(_Stored):
    """A file in pictures/."""

    id: str
    question: str
    expected: str
    frames: list[int]
    strips: list[StoredStrip]
