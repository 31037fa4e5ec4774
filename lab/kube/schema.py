"""Every object has a schema, and keeps it strictly: a misspelt field is an error, not a field that nobody reads."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from kubernetes_validate.utils import SchemaNotFoundError, ValidationError

from lab.kube.overlay import Object, Overlay, Problem

KUBERNETES = "1.37"
FOLDER = Path(__file__).parent / "schemas"
"""Schemas of ours for custom resources, as far as we use them; one file a kind."""


def check(overlay: Overlay) -> Iterator[Problem]:
    """Schemas of all objects."""
    for found in overlay.objects:
        # Overlays have most objects in common.
        if problem := _check(json.dumps(found.data)):
            yield found.wrong(*problem)


@functools.lru_cache(maxsize=500)
def _check(text: str) -> tuple[str, str] | None:
    data = json.loads(text)
    try:
        if schema := _ours(data["apiVersion"], data["kind"]):
            jsonschema.Draft202012Validator(schema).validate(data)
        else:
            kubernetes_validate.validate(data, KUBERNETES, strict=True)
    except SchemaNotFoundError:
        return "apiVersion", f"{data['apiVersion']} {Object(data).kind} is not known; lab/kube/schemas takes a schema"
    except (ValidationError, jsonschema.ValidationError) as error:
        return ".".join(
            str(part) for part in error.path
        ) or "(whole)", f"schema of {data['apiVersion']}: {error.message[:300]}"
    return None


@functools.lru_cache(maxsize=100)
def _ours(api_version: str, kind: str) -> Mapping[str, Any] | None:
    path = FOLDER / f"{api_version.replace('/', '_')}_{kind}.yaml"
    if not path.exists():
        return None
    schema: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
        "properties": {
            "apiVersion": {},
            "kind": {},
            "metadata": {"type": "object", "required": ["name"]},
            "spec": schema,
        },
    }
