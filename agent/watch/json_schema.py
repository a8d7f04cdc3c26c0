"""JSON schemas that come from outside, and whether an answer is JSON of one. Pure."""

from __future__ import annotations

import json
import re
from typing import Any

from jsonschema import Draft202012Validator, SchemaError, ValidationError

LARGEST = 16 << 10  # characters of a schema


def schema_error(schema: dict[str, Any]) -> str | None:
    """Why this is no JSON schema that is accepted. References elsewhere would be fetched, and patterns can take for ever."""
    try:
        text = json.dumps(schema, separators=(",", ":"))
        if len(text) > LARGEST:
            return "it is longer than 16 KiB"
        if '"$ref"' in text.replace('"$ref":"#', "") or '"$dynamicRef"' in text:
            return "a reference leads outside of it"
        if '"pattern' in text:
            return "patterns are not taken"
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        return str(error.message)[:200]
    except (RecursionError, TypeError):  # as of a date in TOML
        return "it is too deep, or holds what JSON cannot hold"
    return None


def parse_answer(text: str, schema: dict[str, Any]) -> tuple[Any, str | None]:
    """The value of an answer, and why it is not JSON of this schema, if it is not. A Markdown fence around it is removed."""
    try:
        value = json.loads(unfenced(text), parse_constant=_no_constant)
        Draft202012Validator(schema).validate(value)
    except ValidationError as error:
        return None, f"{error.message[:200]} - at `{error.json_path}`"
    except (ValueError, RecursionError) as error:
        return None, f"{error or 'no JSON'}"[:200]
    return value, None


def unfenced(text: str) -> str:
    return re.sub(r"^\s*```\w*\s*|\s*```\s*$", "", text).strip()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
