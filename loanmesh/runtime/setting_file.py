"""The YAML file that LOANMESH_CONFIG names: one section a service."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loanmesh.runtime.plain_yaml import WrongYaml, read_yaml
from loanmesh.runtime.setting_rules import WrongSetting

FILE = "LOANMESH_CONFIG"
SECTIONS = ("intake", "bureau", "scoring", "pricing")
"""What the file may hold."""


def section(service: str) -> dict[str, Any]:
    """The service's part of the file; empty where there is none. Raises WrongSetting."""
    path = os.environ.get(FILE)
    if not path:
        return {}
    whole = _read(Path(path))
    if unknown := [str(word) for word in whole if word not in SECTIONS]:
        raise WrongSetting(FILE, f"{path}: unknown section {', '.join(unknown)}", ", ".join(SECTIONS))
    # A section with nothing below it sets nothing.
    found = whole.get(service) or {}
    if not isinstance(found, dict):
        raise WrongSetting(
            FILE, f"{path}: {service} is {_shape(found)}", f"settings by name, as `{service}: {{server: {{...}}}}`"
        )
    if odd := [str(key) for key in found if not isinstance(key, str)]:
        raise WrongSetting(FILE, f"{path}: {service}.{odd[0]} is no name of a setting")
    return found


def _read(path: Path) -> Mapping[Any, Any]:
    allowed = f"a YAML file with sections {', '.join(SECTIONS)}"
    try:
        whole = read_yaml(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise WrongSetting(FILE, f"{path}: {error.strerror}", allowed) from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise WrongSetting(FILE, f"{path}:{line}: is not UTF-8", allowed) from error
    except WrongYaml as error:
        raise WrongSetting(FILE, f"{path}{error.place}: {error}", allowed) from error
    if whole is not None and not isinstance(whole, dict):
        raise WrongSetting(FILE, f"{path}: is {_shape(whole)}", allowed)
    return whole or {}


def _shape(value: object) -> str:
    return "a list" if isinstance(value, list) else "text" if isinstance(value, str) else "a single value"
