"""The OpenAPI document's schemas, made from the msgspec structs that also validate: there is one truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from serving.auth import Scope
from serving.messages import Refusal

_TEMPLATE: Final = "#/components/schemas/{name}"
_REFUSALS: Final = {
    "400": "the body is not JSON",
    "401": "no token, or an unknown one",
    "403": "the token lacks the scope",
    "404": "what the path names is not there",
    "409": "the registry is not so that this can be done; nothing has changed",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "415": "the body is not declared as JSON",
    "422": "a field is wrong; nothing of the body was used",
    "501": "this server has no operator's access to the registry",
    "503": "not now; try again",
}


def operation(
    takes: Sequence[type],
    gives: Sequence[type],
    status: int,
    scope: Scope,
    parameters: Sequence[dict[str, Any]],
    gives_else: Mapping[str, type],
    refuses: Sequence[str],
) -> dict[str, Any]:
    """Return what a route adds to its OpenAPI operation.

    `gives_else` names what comes with other statuses in place of a refusal, `refuses` the statuses of refusals that
    only few routes have.
    """
    extra: dict[str, Any] = {"responses": {str(status): _content("success", gives)}, "x-scope": scope}
    if parameters:
        extra["parameters"] = list(parameters)
    if takes:
        extra["requestBody"] = {"required": True} | _content("", takes)
    wanted = set(_REFUSALS) - {"404", "409", "501"} if takes else {"401", "403", "422", "503"}
    wanted |= {"404"} if any(parameter["in"] == "path" for parameter in parameters) else set()
    wanted |= set(refuses)
    codes = [code for code in _REFUSALS if code in wanted]
    extra["responses"] |= {code: _content(_REFUSALS[code], [gives_else.get(code, Refusal)]) for code in codes}
    if scope != "public":
        extra["security"] = [{"bearer": []}]
    return extra


def add_components(document: dict[str, Any], types: Sequence[type]) -> dict[str, Any]:
    """Return the document with the schemas of these types and the way to authenticate."""
    _, schemas = msgspec.json.schema_components(list(dict.fromkeys(types)), ref_template=_TEMPLATE)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(schemas)
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return document


def _content(description: str, types: Sequence[type]) -> dict[str, Any]:
    found: dict[str, Any] = {"description": description} if description else {}
    if types:
        schemas = [{"$ref": _TEMPLATE.format(name=kind.__name__)} for kind in types]
        schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
        found["content"] = {"application/json": {"schema": schema}}
    return found
