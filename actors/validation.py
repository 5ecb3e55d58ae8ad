"""Plain data into pydantic models: the first complaint becomes one ``BadInput`` with path, value and fix."""

from __future__ import annotations

import difflib
import json
from typing import Any

from pydantic import BaseModel, ValidationError

from .errors import BadInput


def unknown(value: Any, known: Any, what: str) -> str:
    """``unknown method 'gtpq'. Did you mean 'gptq'?`` or the list of what is known."""
    near = difflib.get_close_matches(str(value), [str(k) for k in known], n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(map(str, known))}."
    return f"unknown {what} {value!r}. {hint}"


def validate(model: type[BaseModel], data: Any, where: str = "") -> Any:
    """``model`` from plain data; the first pydantic error as ``BadInput`` with the YAML path, the value and what is allowed."""
    try:
        return model.model_validate(data)
    except ValidationError as e:
        errors = e.errors(include_url=False)
        # A union reports one error a branch; the longest path is the branch that the user meant.
        err = max(errors, key=lambda x: len(x["loc"])) if len({str(x["loc"][:1]) for x in errors}) == 1 else errors[0]
        path = _yaml_path(err["loc"], data, missing=err["type"] == "missing")
        full = ".".join(p for p in (where, path) if p)
        if err["type"] == "extra_forbidden":
            fields = _fields_at(model, err["loc"])
            raise BadInput(unknown(err["loc"][-1], fields, "field"), where=full) from None
        problem = err["msg"].removeprefix("Value error, ")
        shown = repr(err.get("input"))
        value = "" if shown in problem or len(shown) > 80 or err["type"] == "missing" else f" (got {shown})"
        more = f" ({len(errors) - 1} more after this one.)" if len(errors) > 1 else ""
        problem, fix = _shape(model, err) or (f"{problem}{value}", "")
        raise BadInput(problem, where=full, fix=f"{fix}{more}".strip()) from None


def _shape(model: type[BaseModel], err: Any) -> tuple[str, str] | None:
    """(problem, fix) of a value of the wrong form: one for a list, a bare one for a mapping, text for a list of numbers."""
    given = err.get("input")
    if given == []:
        return "an empty list leaves no cell", "Give values, or leave it out."
    if given is None and err["type"] != "missing":
        return "is empty", "Give a value, or leave it out."
    shown = given if isinstance(given, str) else json.dumps(given, default=str)
    if err["type"] in ("tuple_type", "list_type"):
        return f"{given!r} is no list", f"Write [{shown}]."
    if err["type"] in ("model_type", "model_attributes_type", "dict_type"):
        fields = _fields_at(model, (*err["loc"], ""))
        first = f"Write {{{fields[0]}: {shown}}}. Fields: {', '.join(fields)}." if fields else "Write {field: value}."
        return f"{given!r} is no mapping", first
    if err["type"] in ("int_parsing", "float_parsing", "bool_parsing") and isinstance(given, str) and "," in given:
        return f"{given!r} is text", f"A list is written [{given}]."
    return None


def _yaml_path(loc: tuple[int | str, ...], data: Any, *, missing: bool) -> str:
    """Only the parts of a pydantic location that are keys or indices of the data (a union adds its branches), or a ``missing`` key."""
    out, node = "", data
    for n, part in enumerate(loc):
        if isinstance(part, int) and isinstance(node, list | tuple) and part < len(node):
            out, node = f"{out}[{part}]", node[part]
        elif isinstance(part, str) and isinstance(node, dict) and (part in node or (missing and n == len(loc) - 1)):
            out, node = f"{out}.{part}" if out else part, node.get(part)
    return out


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    from typing import get_args

    current: Any = model
    for part in loc[:-1]:
        if isinstance(part, int) or not hasattr(current, "model_fields") or part not in current.model_fields:
            continue
        todo, current = [current.model_fields[part].annotation], None
        while todo:
            t = todo.pop()
            if isinstance(t, type) and issubclass(t, BaseModel):
                current = t
            todo.extend(get_args(t))
    return list(current.model_fields) if current is not None else []
