"""Settings: what is in force, and that a wrong one stops the start by its name and says what is allowed."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from pydantic_settings import BaseSettings
from typer.testing import CliRunner

from loanmesh.cli.main import app
from loanmesh.cli.mesh import last_words
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.database import open_database
from loanmesh.runtime.knobs import knobs, names
from loanmesh.runtime.migrations import upgrade
from loanmesh.runtime.opening import opening
from loanmesh.runtime.setting_rules import NotReachable, WrongSetting, refusing
from loanmesh.runtime.settings import load, prefix_of
from services.bureau.settings import BureauSettings
from services.intake.settings import IntakeSettings
from services.pricing.settings import PricingSettings
from services.scoring import main as scoring
from services.scoring.settings import ScoringSettings

CLASSES: dict[str, type[BaseSettings]] = {
    "INTAKE": IntakeSettings, "BUREAU": BureauSettings, "SCORING": ScoringSettings, "PRICING": PricingSettings,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing set but what a test sets."""
    for settings_class in CLASSES.values():
        for name in names(settings_class, prefix_of(settings_class)):
            monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("LOANMESH_CONFIG", raising=False)


def a_file(folder: Path, content: str | bytes) -> str:
    path = folder / "loanmesh.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def complaint(settings_class: type[BaseSettings], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said when the start is refused; it must end with 2."""
    with pytest.raises(SystemExit) as stop:
        load(settings_class)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_environment_goes_before_the_file_and_the_file_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load(IntakeSettings).lease.duration_s == 10.0
    monkeypatch.setenv("LOANMESH_CONFIG", a_file(tmp_path, "intake: {lease: {duration_s: 20, poll_s: 3}}\npricing:\n"))
    assert load(IntakeSettings).lease.duration_s == 20.0
    monkeypatch.setenv("INTAKE_LEASE__DURATION_S", "30")
    assert (load(IntakeSettings).lease.duration_s, load(IntakeSettings).lease.poll_s) == (30.0, 3.0)
    assert load(PricingSettings).policy == "cn-demo-2026-11"  # An empty section sets nothing.


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("intake: hello", ["intake is text", "settings by name"]),
        ("intake: [1, 2]", ["intake is a list", "settings by name"]),
        ("intake: {7: 2}", ["intake.7"]),
        (b"intake:\n  bureau: \xff\xfe", [":2:", "UTF-8"]),
        ("- intake", ["is a list", "intake, bureau, scoring, pricing"]),
        ("hello", ["is text", "intake, bureau, scoring, pricing"]),
        ("intke: {}", ["unknown section intke", "intake, bureau, scoring, pricing"]),
        ("intake: {\n  lease: [}", [":2:"]),
        ("[" * 100_000, ["nest deeper than 32"]),
        ("intake: {lease: {duration_s: -1}}", ["INTAKE_LEASE__DURATION_S", "intake.lease.duration_s", "above 0"]),
        ("intake: {lease: {duration_s: .inf}}", ["intake.lease.duration_s", "finite"]),
        ("intake: {lease: 5}", ["intake.lease", "INTAKE_LEASE__POLL_S"]),
        ("intake: {leese: {}}", ["intake.leese", "unknown", "INTAKE_LEASE__POLL_S"]),
    ],
)
def test_a_file_that_cannot_be_is_named_with_what_is_allowed(
    content: str | bytes, said: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = a_file(tmp_path, content)
    monkeypatch.setenv("LOANMESH_CONFIG", path)
    found = complaint(IntakeSettings, capsys)
    for words in [*said, path]:
        assert words in found


def test_a_file_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("LOANMESH_CONFIG", str(tmp_path / "gone.yaml"))
    assert "LOANMESH_CONFIG" in complaint(IntakeSettings, capsys)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("INTAKE_WORK", "notjson", "INTAKE_WORK__BATCH_MAX"),
        ("INTAKE_WORK", "[]", "INTAKE_WORK__BATCH_MAX"),
        ("INTAKE_WORK__BATCH_MAX", "257", "from 1 up to 256"),
        ("INTAKE_WORK__BATCHMAX", "1", "INTAKE_WORK__BATCH_MAX"),
        ("INTAKE_LEASE__POLL_S", "nan", "above 0"),
        ("INTAKE_DATABASE_URL", "mysql://x", "sqlite:///PATH"),
        ("INTAKE_DATABASE_URL", "sqlite:///:memory:", "sqlite:///PATH"),
        ("INTAKE_DATABASE_URL", "postgresql://host:many/x", "postgresql://"),
        ("INTAKE_BUREAU", "", "HOST:PORT"),
        ("INTAKE_BUREAU", "one:1,two:2", "IP addresses"),
        ("INTAKE_SERVER__LISTEN", "127.0.0.1:99999", "65535"),
        ("SCORING_FIRM_MODEL", "nope", "firm-2026-11"),
        ("PRICING_POLICY", "nope", "cn-demo-2026-11"),
        ("PRICING_TELEMETRY__LOG_LEVEL", "loud", "debug, info, warning, error"),
        ("PRICING_TELEMETRY__OTLP_ENDPOINT", "foo", "HOST:PORT"),
        ("BUREAU_SOURCES_URL", "foo", "http://"),
        ("BUREAU_BROWNOUT__OPTIONAL", "moon", "a JSON list"),
        ("INTAKE_QUOTA__CLIENTS", "shop=5", "a JSON object"),
        ("INTAKE_QUOTA__CLIENTS", '{"shop": {"a_second": -1}}', "a JSON object"),
        ("INTAKE_TLS__MODE", "off", "mtls, plaintext"),
        ("INTAKE_TLS__TRUST_DOMAIN", "Loan Mesh", "such as loanmesh"),
        ("INTAKE_SERVER__HEALTH_LISTEN", "7400", "or empty"),
    ],
)
def test_a_wrong_variable_is_named_with_what_is_allowed(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, value)
    said = complaint(CLASSES[name.split("_")[0]], capsys)
    assert f"settings: {name}: " in said
    assert allowed in said.split("; allowed: ")[1]


def test_all_that_is_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("INTAKE_BUREAU", "")
    monkeypatch.setenv("INTAKE_LEASE__POLL_S", "0")
    assert len(complaint(IntakeSettings, capsys).splitlines()) == 2


@pytest.mark.parametrize("target", ["localhost:1", "10.0.0.1:1,10.0.0.2:2", "dns:///bureau:7402", "[::1]:7402"])
def test_addresses_that_grpc_understands_are_taken(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAKE_BUREAU", target)
    assert load(IntakeSettings).bureau == target


def test_the_short_scheme_of_postgresql_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAKE_DATABASE_URL", "postgres://u:p@host/name")
    assert load(IntakeSettings).database_url.get_secret_value() == "postgresql://u:p@host/name"


def test_every_knob_says_what_it_does_and_what_is_allowed() -> None:
    for settings_class in CLASSES.values():
        for knob in knobs(settings_class, prefix_of(settings_class)):
            assert knob.doc, knob.name
            assert knob.allowed, knob.name


@pytest.mark.parametrize(
    ("content", "why"), [(b"this is no database, but long enough to be read as one", "not a database"), (None, "open")]
)
async def test_a_file_that_is_no_database_is_named(content: bytes | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "intake.db"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    url = f"sqlite:///{path}"
    with pytest.raises(WrongSetting, match=f"INTAKE_DATABASE_URL.*{why}") as wrong, opening("INTAKE_DATABASE_URL", url):
        await asyncio.to_thread(upgrade, url, "services.intake")
    assert wrong.value.exit_code == 2
    with pytest.raises(WrongSetting, match="INTAKE_DATABASE_URL"), opening("INTAKE_DATABASE_URL", url):
        await open_database(url)


async def test_a_server_that_is_down_may_come_back_and_its_password_stays_hidden() -> None:
    url = "postgresql://somebody:secret@127.0.0.1:1/intake"
    for step in (lambda: asyncio.to_thread(upgrade, url, "services.intake"), lambda: open_database(url)):
        with pytest.raises(NotReachable, match="INTAKE_DATABASE_URL") as away, opening("INTAKE_DATABASE_URL", url):
            await step()
        assert away.value.exit_code == 1
        assert "secret" not in str(away.value)


def test_a_wrong_setting_ends_a_start_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @refusing()
    def start() -> None:
        raise WrongSetting("INTAKE_X", "is wrong", "right ones")

    with pytest.raises(SystemExit) as stop:
        start()
    assert stop.value.code == 2
    assert capsys.readouterr().err == "settings: INTAKE_X: is wrong; allowed: right ones\n"


async def test_a_model_for_persons_does_not_score_firms() -> None:
    settings = ScoringSettings(firm_model="consumer-2026-11")
    with pytest.raises(WrongSetting, match="SCORING_FIRM_MODEL"):
        await scoring.build(settings, FakeClock())


def test_what_a_part_said_for_people_goes_before_its_last_line(tmp_path: Path) -> None:
    log = tmp_path / "intake.log"
    log.write_text("settings: of an earlier start\n", encoding="utf-8")
    before = log.stat().st_size
    assert last_words(log, before) == "without a word"
    with log.open("a", encoding="utf-8") as file:
        file.write("noise\nsettings: A: wrong\nsettings: B: wrong\nlast line of a trace\n")
    assert last_words(log, before) == "A: wrong; B: wrong"


def test_the_command_shows_what_is_in_force_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUREAU_DATABASE_URL", "postgresql://loanmesh:very-secret@host/bureau")
    monkeypatch.setenv("BUREAU_GATHER__BUDGET_S", "2.5")
    shown = CliRunner().invoke(app, ["settings", "bureau", "--json"])
    lines = {line["name"]: line for line in json.loads(shown.stdout)}
    assert lines["BUREAU_GATHER__BUDGET_S"]["value"] == 2.5
    assert lines["BUREAU_GATHER__BUDGET_S"]["default"] == 1.0
    assert lines["BUREAU_DATABASE_URL"]["value"] == "***"
    assert set(lines) == set(names(BureauSettings, "BUREAU_"))
    plain = CliRunner().invoke(app, ["settings", "bureau"]).stdout
    assert "BUREAU_GATHER__BUDGET_S = 2.5 (default 1.0)" in plain
    assert "very-secret" not in shown.stdout + plain
    assert CliRunner().invoke(app, ["settings", "moon"]).exit_code == 2


def test_a_client_can_have_a_quota_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAKE_QUOTA__CLIENTS", '{"shop": {"a_second": 50, "burst": 500}}')
    assert load(IntakeSettings).quota.clients["shop"].a_second == 50
