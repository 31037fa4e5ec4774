"""Settings: read once at start from environment and file, frozen, passed down in parts.

Order of strength: environment (`INTAKE_SERVER__LISTEN`), then the YAML file named by `LOANMESH_CONFIG` under the
service's name, then defaults. Unknown names stop the start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict


class ServerSettings(BaseModel, frozen=True, extra="forbid"):
    """How a service listens and leaves."""

    listen: Annotated[str, Field(pattern=r"^[^:]+:\d{1,5}$")] = "127.0.0.1:0"
    """Address and port. Port 0 takes a free one, which the ready line names."""
    drain_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds that calls under way get to finish after SIGTERM. Longer than the longest deadline."""
    leave_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds between turning unhealthy and refusing calls: the lag of endpoint lists. 5 to 10 in a cluster."""
    max_connection_age_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a connection lives before the client must look up addresses again; lets new replicas get traffic."""
    max_message_mib: Annotated[int, Field(ge=1, le=64)] = 8
    """Largest message taken, MiB."""


class TelemetrySettings(BaseModel, frozen=True, extra="forbid"):
    """Where traces, metrics and logs go."""

    otlp_endpoint: str = ""
    """OTLP/gRPC endpoint, e.g. `127.0.0.1:4317`. Empty: nothing is exported."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of new traces that are recorded; a caller's own choice is followed."""
    log_level: Annotated[str, Field(pattern="^(debug|info|warning|error)$")] = "info"
    """Least level that is logged: debug, info, warning or error."""


class _ServiceSection(PydanticBaseSettingsSource):
    """The service's section of the file that LOANMESH_CONFIG names."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        path = os.environ.get("LOANMESH_CONFIG")
        if not path:
            return {}
        whole = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        section = whole.get(str(self.config.get("env_prefix", "")).rstrip("_").lower(), {})
        return dict(section)


class ServiceSettings(BaseSettings):
    """What all services can set; each adds its own."""

    model_config = SettingsConfigDict(env_nested_delimiter="__", frozen=True, extra="forbid")
    server: ServerSettings = ServerSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment over file over defaults."""
        return init_settings, env_settings, _ServiceSection(settings_cls), file_secret_settings


S = TypeVar("S", bound=BaseSettings)


def load(settings_class: type[S]) -> S:
    """The settings in force. Ends the process with 2 and says name, value and rule when one is wrong."""
    prefix = str(settings_class.model_config.get("env_prefix", ""))
    problems = [f"{name}: unknown setting; {_known(settings_class)}" for name in _unknown(settings_class, prefix)]
    if not problems:
        try:
            return settings_class()
        except ValidationError as error:
            for problem in error.errors(include_url=False):
                name = prefix + "__".join(str(part).upper() for part in problem["loc"])
                shown = "" if "secret" in name.lower() or "url" in name.lower() else f", not {problem['input']!r}"
                problems.append(f"{name}: {problem['msg']}{shown}")
        except (OSError, yaml.YAMLError) as error:
            problems.append(f"LOANMESH_CONFIG: {error}")
    sys.stderr.write("".join(f"settings: {problem}\n" for problem in problems))
    raise SystemExit(2)


def names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The environment names a settings class understands."""
    for field, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from names(inner, f"{prefix}{field.upper()}__")
        else:
            yield f"{prefix}{field.upper()}"


def _unknown(settings_class: type[BaseSettings], prefix: str) -> list[str]:
    known = set(names(settings_class, prefix))
    whole = {name.split("__")[0] for name in known}
    return [n for n in sorted(os.environ) if prefix and n.startswith(prefix) and n not in known and n not in whole]


def _known(settings_class: type[BaseSettings]) -> str:
    prefix = str(settings_class.model_config.get("env_prefix", ""))
    return "known are " + ", ".join(names(settings_class, prefix))
