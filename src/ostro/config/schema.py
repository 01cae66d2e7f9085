"""The JSON schema of a config class, for editors."""

from dataclasses import MISSING
from datetime import timedelta
from typing import Any, Literal, get_args, get_origin

from ostro.config import fields
from ostro.config.encode import encode
from ostro.core.units import ByteSize

_SIMPLE = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    # YAML readers of editors take `1e-4` for text, and we read it as the number it is
    int: {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[+-]?\d[\d_]*$"}]},
    float: {"anyOf": [{"type": "number"},
                      {"type": "string", "pattern": r"^[+-]?[\d_.]+([eE][+-]?\d+)?$"}]},
    timedelta: {"type": ["string", "number"]},
    ByteSize: {"type": ["string", "integer"]},
    type(None): {"type": "null"},
}  # fmt: skip


def json_schema(cls: type) -> dict[str, Any]:
    """The schema (draft 2020-12) of the files that `load(cls, ...)` reads."""
    definitions: dict[str, Any] = {}
    top = _reference(cls, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **top, "$defs": definitions}


def _reference(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    name = cls.__qualname__.replace("<locals>.", "")
    if name not in definitions:
        definitions[name] = {}  # taken, so that a class may refer to itself
        definitions[name].update(_object(cls, definitions))
    return {"$ref": f"#/$defs/{name}"}


def _object(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    docs, properties, required = fields.field_docs(cls), {}, []
    if name := fields.choice_name(cls):
        properties["type"] = {"const": name}
    for item in fields.settings(cls):
        schema, default = dict(_schema(item.type, definitions)), item.default
        if item.name in docs:
            schema["description"] = docs[item.name]
        if default is MISSING:
            required.append(item.name)
        else:
            schema["default"] = encode(default)
        properties[item.name] = schema
    result = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**result, "required": required} if required else result


def _schema(tp: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    options = [_member(member, definitions) for member in fields.members(tp)]
    return options[0] if len(options) == 1 else {"anyOf": options}


def _member(tp: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    if tp in _SIMPLE:
        return _SIMPLE[tp]
    if get_origin(tp) is Literal:
        return {"enum": list(get_args(tp))}
    if fields.is_registry(tp):
        return _registry(tp, definitions)
    if fields.is_record(tp):
        return {"anyOf": [_reference(tp, definitions), {"type": "null"}]}
    if fields.is_list(tp):
        items = _schema(fields.element(tp), definitions)
        array = {"type": "array", "items": items}
        # a bare word is a list of one
        return (
            array
            if any(map(fields.is_record, fields.members(fields.element(tp))))
            else {"anyOf": [array, items]}
        )
    if fields.is_dict(tp):
        args = get_args(tp)
        return {
            "type": "object",
            "additionalProperties": _schema(args[1], definitions) if args else True,
        }
    return {"type": "string"} if hasattr(tp, "from_text") else {}


def _registry(tp: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    known, default = tp.get_known_choices(), tp.default_choice_name()
    rules = [
        {
            "if": {"properties": {"type": {"const": name}}, "required": ["type"]},
            "then": _reference(cls, definitions),
        }
        for name, cls in known.items()
    ]
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"type": {"enum": list(known)}},
        "allOf": rules,
    }
    if default is None:
        schema["required"] = ["type"]
    elif default in known:
        untyped = {"if": {"not": {"required": ["type"]}}}
        rules.append({**untyped, "then": _reference(known[default], definitions)})
    return {"anyOf": [schema, {"type": "string"}]}
