"""What all documents share: numbers that JSON can't hold, versions, reading with one clear line for every mistake."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
)

from dpaudit import checksums
from dpaudit.errors import UsageError
from dpaudit.untrusted import MOST_DOCUMENT, read_bytes

SCHEMA_VERSION = 2
READABLE = (1, 2)  # version 1 has no e-values and no kind; what is missing takes its default
MOST_BYTES = MOST_DOCUMENT


def _parse_number(value: object) -> object:
    if value == "inf":
        return math.inf
    if value == "-inf":
        return -math.inf
    return value


def _no_nan(value: float) -> float:
    if math.isnan(value):
        raise ValueError("a document can't hold NaN")
    return value


def _print_number(value: float) -> float | str:
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


# Infinite numbers where they mean something; every plain `float` of a document is finite.
Number = Annotated[
    float,
    Field(allow_inf_nan=True),
    AfterValidator(_no_nan),
    BeforeValidator(_parse_number, json_schema_input_type=float | Literal["inf", "-inf"]),
    PlainSerializer(_print_number, return_type=float | Literal["inf", "-inf"], when_used="json"),
]


class Part(BaseModel):
    """A piece of a document."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, allow_inf_nan=False)


class Document(Part):
    """A whole JSON document."""

    kind: str
    schema_version: int = SCHEMA_VERSION

    @field_validator("schema_version")
    @classmethod
    def _this_version(cls, value: int) -> int:
        if value not in READABLE:
            raise ValueError(f"is {value}; this dpaudit reads {' and '.join(map(str, READABLE))}")
        return value

    @classmethod
    def named(cls) -> str:
        """The kind of this document."""
        return str(cls.model_fields["kind"].default)

    def to_json(self) -> str:
        """Stable text: two spaces, a newline at the end, fields in declared order."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and validate `path`; raises UsageError with one line that names file and field.

        Where a list of checksums lies beside it, the file must be the one that was written (dpaudit.checksums).
        """
        try:
            content = read_bytes(path, MOST_DOCUMENT)
            checksums.verify(path, content)
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: can't be read as a {cls.named()} document ({error})") from error
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "document"
            raise UsageError(f"{path}: not a {cls.named()} document: {where}: {first['msg']}") from error

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """The JSON Schema of what `to_json` writes."""
        schema = cls.model_json_schema(mode="serialization", by_alias=True)
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
