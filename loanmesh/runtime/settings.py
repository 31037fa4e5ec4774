"""Settings: read once at start from environment and file, frozen, passed down in parts.

Order of strength: environment (`INTAKE_SERVER__LISTEN`), then the YAML file named by `LOANMESH_CONFIG` under the
service's name, then defaults. Unknown names and values that cannot be stop the start, named, with what is allowed.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from loanmesh.runtime.knobs import knobs, names
from loanmesh.runtime.limits import LimitSettings
from loanmesh.runtime.setting_file import FILE, section
from loanmesh.runtime.setting_rules import (
    ExtraListen,
    Listen,
    Must,
    TrustDomain,
    WrongSetting,
    is_host_port,
    is_http,
    refuse,
)


class ServerSettings(BaseModel, frozen=True, extra="forbid"):
    """How a service listens and leaves."""

    listen: Listen = "127.0.0.1:0"
    """Address and port. Port 0 takes a free one, which the ready line names."""
    health_listen: ExtraListen = ""
    """A second port that serves grpc.health.v1 without TLS and nothing else, for probes, which bring no certificate.
    Empty: health on the main port only."""
    token_listen: ExtraListen = ""
    """A port with TLS that asks for no certificate: callers there prove themselves by a token. Empty: none."""
    drain_s: Annotated[float, Field(ge=0)] = 10.0
    """Seconds that calls under way get to finish after SIGTERM. Longer than the longest deadline."""
    leave_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds between turning unhealthy and refusing calls: the lag of endpoint lists. 5 to 10 in a cluster."""
    max_connection_age_s: Annotated[float, Field(gt=0)] = 30.0
    """How long a connection lives before the client must look up addresses again; lets new replicas get traffic."""
    max_message_mib: Annotated[int, Field(ge=1, le=64)] = 8
    """Largest message taken, MiB, unpacked where it comes compressed."""
    token_message_max_mib: Annotated[int, Field(ge=1, le=64)] = 4
    """The same on `token_listen`, whose callers stand outside, and never more than `max_message_mib`. The
    largest batch, 500 applications, has 8 KiB for each."""
    limits: LimitSettings = LimitSettings()


class PrivacySettings(BaseModel, frozen=True, extra="forbid"):
    """Keys to what is stored of persons and firms, and how passes over it go."""

    keys_file: str
    """JSON file of keys, for its owner alone; in a cluster a mounted Secret. Re-read when it changes.
    `loanmesh keys new FILE` makes one, `loanmesh keys rotate FILE` adds newer keys."""
    pass_every_s: Annotated[float, Field(gt=0)] = 60.0
    """How often to look for what is to be sealed anew or erased."""
    pass_rows: Annotated[int, Field(ge=1, le=1000)] = 100
    """Rows a transaction of such a pass; between two of them it rests, so that it takes a tenth of the time at most."""


class TlsSettings(BaseModel, frozen=True, extra="forbid"):
    """Who a service is to others, and whom it believes. Files are read again when they change."""

    mode: Literal["mtls", "plaintext"] = "mtls"
    """mtls: both sides show certificates. plaintext: no encryption, callers are who they say; on loopback only."""
    cert_file: str = ""
    """Our certificate, PEM, with those between it and the CA behind it (cert-manager's tls.crt). Names us by a URI
    spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE, and the service by a DNS name."""
    key_file: str = ""
    """Its key, PEM (cert-manager's tls.key)."""
    ca_file: str = ""
    """CAs whose certificates we believe, PEM (cert-manager's ca.crt). Two of them while a CA is being replaced."""
    trust_domain: TrustDomain = "loanmesh"
    """Identities of other trust domains are strangers, whoever signed them."""
    reload_s: Annotated[float, Field(gt=0)] = 10.0
    """How often files are looked at, seconds. Certificates must be renewed longer than this before they expire."""


class TokenSettings(BaseModel, frozen=True, extra="forbid"):
    """Tokens (JWT) that say which client or operator calls, beside certificates or, on `server.token_listen`, instead
    of them."""

    keys_file: str = ""
    """Public keys of the issuer, a JSON Web Key Set; read again when it changes. Empty: no tokens are taken."""
    issuer: str = ""
    """The `iss` that tokens must state."""
    audience: str = "loanmesh"
    """The `aud` that tokens must state."""


class AccessSettings(BaseModel, frozen=True, extra="forbid"):
    """Who may call what."""

    table_file: str = ""
    """YAML whose sections (roles, methods, lenders) replace those of the shipped table, loanmesh/runtime/access.yaml.
    Empty: the shipped one, in which only the client `local` acts for a lender, lenders/demo."""


class TelemetrySettings(BaseModel, frozen=True, extra="forbid"):
    """Where traces, metrics and logs go."""

    otlp_endpoint: Annotated[
        str,
        Must(
            "HOST:PORT, http://HOST:PORT or https://HOST:PORT, several with commas, or empty",
            lambda v: not v or all(is_host_port(one.strip()) or is_http(one.strip()) for one in v.split(",")),
        ),
    ] = ""
    """OTLP/gRPC endpoints, e.g. `127.0.0.1:4317`; all get everything. https:// speaks TLS, and
    OTEL_EXPORTER_OTLP_CERTIFICATE names its CA. Empty: what OTEL_EXPORTER_OTLP_ENDPOINT names, else nothing is
    exported."""
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of new traces that are recorded though nothing is wrong; a caller's own choice is followed."""
    slow_s: Annotated[float, Field(gt=0)] = 2.0
    """From which age on, seconds, an interactive application's decision is late; it is then traced in full. A
    partner's may be twice as old, one of bulk ten times, a re-assessment thirty times."""
    slow_call_s: Annotated[float, Field(gt=0)] = 1.0
    """From which duration on, seconds, a call is slow and its span kept. Waits that were asked for do not count."""
    metrics_every_s: Annotated[float, Field(ge=1)] = 15.0
    """How often metrics are sent, seconds."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""


class _ServiceSection(PydanticBaseSettingsSource):
    """The service's section of the file that LOANMESH_CONFIG names."""

    def get_field_value(self, field: Any, field_name: str) -> tuple[Any, str, bool]:
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        return section(prefix_of(self.settings_cls).rstrip("_").lower())


class ServiceSettings(BaseSettings):
    """What all services can set; each adds its own."""

    model_config = SettingsConfigDict(env_nested_delimiter="__", frozen=True, extra="forbid")
    server: ServerSettings = ServerSettings()
    tls: TlsSettings = TlsSettings()
    tokens: TokenSettings = TokenSettings()
    access: AccessSettings = AccessSettings()
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
    """The settings in force. Ends the process with 2, naming each that is wrong and what is allowed."""
    problems = [*_unknown(settings_class), *_not_json(settings_class)]
    if not problems:
        try:
            settings = settings_class()
            problems += _endless(settings)
            if not problems:
                return settings
        except WrongSetting as error:
            problems.append(error)
        except ValidationError as error:
            problems += [_problem(settings_class, found) for found in error.errors(include_url=False)]
        except SettingsError as error:
            problems.append(WrongSetting(prefix_of(settings_class) + "*", str(error)))
    refuse(*problems)


def prefix_of(settings_class: type[BaseSettings]) -> str:
    """What its names in the environment begin with."""
    return str(settings_class.model_config.get("env_prefix", ""))


def _known(settings_class: type[BaseSettings], start: str = "") -> str:
    return ", ".join(name for name in names(settings_class, prefix_of(settings_class)) if name.startswith(start))


def _unknown_setting(settings_class: type[BaseSettings], plain: str, shown: str) -> WrongSetting:
    """With the names of its own section, where it has one that is known; else all."""
    near = _known(settings_class, plain.rsplit("__", 1)[0] + "__") if "__" in plain else ""
    return WrongSetting(shown, "unknown setting", near or _known(settings_class))


def _unknown(settings_class: type[BaseSettings]) -> Iterator[WrongSetting]:
    prefix = prefix_of(settings_class)
    known = set(names(settings_class, prefix))
    whole = {name.split("__")[0] for name in known}
    for name in sorted(os.environ):
        if prefix and name.startswith(prefix) and name not in known | whole:
            yield _unknown_setting(settings_class, name, name)


def _not_json(settings_class: type[BaseSettings]) -> Iterator[WrongSetting]:
    """Sections and lists come from the environment as JSON."""
    prefix = prefix_of(settings_class)
    found = list(knobs(settings_class, prefix))
    sections = {prefix + knob.path[0].upper() for knob in found if len(knob.path) > 1}
    for name in sorted(sections | {knob.name for knob in found if knob.json}):
        if name in os.environ:
            try:
                read = json.loads(os.environ[name])
            except (ValueError, RecursionError):
                read = None
            if name in sections and not isinstance(read, dict):
                parts = _known(settings_class, f"{name}__")
                yield WrongSetting(name, "is no JSON object", f"its parts one by one: {parts}")
            elif read is None:
                allowed = next((knob.allowed for knob in found if knob.name == name), "")
                yield WrongSetting(name, "is no JSON", allowed)


def _endless(settings: BaseSettings) -> Iterator[WrongSetting]:
    for knob in knobs(type(settings), prefix_of(type(settings))):
        value = knob.value(settings)
        if isinstance(value, float) and not math.isfinite(value):
            yield WrongSetting(_named(knob.name, knob.path), f"is {value}", f"{knob.allowed}, and finite")


def _problem(settings_class: type[BaseSettings], found: Any) -> WrongSetting:
    """One complaint of pydantic, in our words."""
    prefix = prefix_of(settings_class)
    path = tuple(str(part) for part in found["loc"])
    all_ = list(knobs(settings_class, prefix))
    # A complaint about a list's item is one about the list.
    knob = next((knob for knob in all_ if knob.path == path[: len(knob.path)]), None)
    plain = prefix + "__".join(path).upper()
    name = _named(plain, path)
    if knob:
        hidden = knob.secret or "url" in knob.name.lower()
        shown = "cannot be what it is set to" if hidden else f"cannot be {str(found['input'])[:100]!r}"
        why = "must be set too, beside what else is set of its section" if found["type"] == "missing" else shown
        return WrongSetting(_named(knob.name, knob.path), why, knob.allowed)
    if found["type"] == "extra_forbidden":
        return _unknown_setting(settings_class, plain, name)
    if parts := _known(settings_class, f"{plain}__"):
        if found["type"] in ("model_type", "dict_type", "model_attributes_type"):
            return WrongSetting(name, "holds settings by name, no value of its own", parts)
        return WrongSetting(name, str(found["msg"]).removeprefix("Value error, "), parts)
    return WrongSetting(name, str(found["msg"]))


def _named(name: str, path: tuple[str, ...]) -> str:
    """The name, and the place in the file where the value stands there and not in the environment."""
    if name in os.environ or any(name.startswith(f"{set_}__") for set_ in os.environ) or FILE not in os.environ:
        return name
    return f"{name} ({name.split('_')[0].lower()}.{'.'.join(path)} in {os.environ[FILE]})"
