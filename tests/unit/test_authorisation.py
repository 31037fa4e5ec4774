"""The table of who may call what: complete, closed, and told in words where it is wrong."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from structlog.testing import capture_logs

from loanmesh.runtime.authorisation import Authorisation, load_table, matches
from loanmesh.runtime.caller import STRANGER, Caller, of_certificate
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.door import KINDS_MAX, Door
from loanmesh.runtime.errors import NotAllowed, Unauthenticated
from loanmesh.runtime.setting_rules import WrongSetting

INTAKE = "lending.intake.v1.IntakeService"
BUREAU = "lending.bureau.v1.BureauService/GatherProfiles"
CONTRACT = FileDescriptorSet.FromString((resources.files("lending") / "descriptors.binpb").read_bytes())
METHODS = [
    (f"{file.package}.{service.name}", method.name)
    for file in CONTRACT.file
    for service in file.service
    for method in service.method
]


def shipped() -> Authorisation:
    return Authorisation(load_table("X", ""), "loanmesh")


def by_certificate(path: str) -> Caller:
    found = of_certificate({"peer_spiffe_id": [f"spiffe://loanmesh/{path}".encode()]}, "loanmesh")
    assert found
    return found


def may(path: str, method: str) -> bool:
    try:
        shipped().check_method(by_certificate(path), method)
    except NotAllowed:
        return False
    return True


def test_every_method_of_the_contract_has_a_line() -> None:
    table = load_table("X", "")
    assert METHODS
    assert [f"{s}/{m}" for s, m in METHODS if not table.callers(f"{s}/{m}")] == []


def test_every_line_is_about_a_method_that_there_is() -> None:
    ours = {f"{s}/{m}" for s, m in METHODS} | {f"{s}/*" for s, _ in METHODS}
    lines = [line for line in load_table("X", "").methods if line.startswith("lending.")]
    assert [line for line in lines if line not in ours] == []


@pytest.mark.parametrize(("service", "method"), METHODS)
def test_a_stranger_may_call_nothing_of_ours(service: str, method: str) -> None:
    with pytest.raises(Unauthenticated):
        shipped().check_method(STRANGER, f"{service}/{method}")


def test_whatever_a_client_may_call_is_asked_for_which_lender() -> None:
    open_to_clients = [s for s, m in METHODS if may("client/local", f"{s}/{m}")]
    assert set(open_to_clients) == {INTAKE}


def test_behind_intake_only_intake_calls() -> None:
    assert may("ns/loanmesh/sa/intake", BUREAU)
    for path in ("ns/loanmesh/sa/pricing", "ns/other/sa/intake", "client/local", "operator/ann", "client/intake"):
        assert not may(path, BUREAU), path


def test_what_no_line_allows_is_refused() -> None:
    assert not may("client/local", "lending.future.v1.Service/Method")
    assert not may("client/local", f"{INTAKE}/NoSuchMethod")
    assert not may("client/local", INTAKE)
    assert may("ns/keda/sa/keda-operator", "externalscaler.ExternalScaler/IsActive")
    assert not may("ns/loanmesh/sa/keda-operator", "externalscaler.ExternalScaler/IsActive")


@pytest.mark.parametrize(
    ("path", "request_", "allowed"),
    [
        ("client/local", {"parent": "lenders/demo"}, True),
        ("client/local", {"name": "lenders/demo/applications/1"}, True),
        ("client/local", {"parent": "lenders/other"}, False),
        ("client/local", {"parent": "lenders/demo2"}, False),
        ("client/local", {"name": ""}, False),
        ("client/local", {}, False),
        ("client/other", {"parent": "lenders/demo"}, False),
        ("operator/ann", {"name": "lenders/any/applications/1"}, True),
        # What is parked is asked for all lenders at once, and released for several.
        ("operator/ann", {}, True),
        ("operator/ann", {"names": ["lenders/a/applications/1", "lenders/b/applications/2"]}, True),
        ("client/local", {"names": ["lenders/demo/applications/1", "lenders/b/applications/2"]}, False),
    ],
)
def test_for_whom_a_caller_may_act(path: str, request_: dict[str, object], allowed: bool) -> None:
    def check() -> None:
        shipped().check_lender(by_certificate(path), f"{INTAKE}/GetApplication", SimpleNamespace(**request_))

    if allowed:
        check()
    else:
        with pytest.raises(NotAllowed):
            check()


@pytest.mark.parametrize(
    "identity",
    [
        b"spiffe://elsewhere/client/local",
        b"spiffe://loanmesh/client/",
        b"spiffe://loanmesh/client/a/b",
        b"spiffe://loanmesh/ns/a/sa/",
        b"spiffe://loanmesh/admin/root",
        b"spiffe://loanmesh.evil/client/local",
        b"https://loanmesh/client/local",
        b"\xff\xfe",
        b"",
    ],
)
def test_other_identities_are_nobodys(identity: bytes) -> None:
    assert of_certificate({"peer_spiffe_id": [identity]}, "loanmesh") is None


def test_without_an_identity_or_with_two_nobody_calls() -> None:
    assert of_certificate({}, "loanmesh") is None
    two = [b"spiffe://loanmesh/client/a", b"spiffe://loanmesh/client/b"]
    assert of_certificate({"peer_spiffe_id": two}, "loanmesh") is None


def test_a_star_is_one_word() -> None:
    assert matches("client/*", "client/a")
    assert not matches("client/*", "client/a/b")
    assert not matches("client/*", "client")
    assert not matches("*", "client/a")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1]", "holds no sections"),
        ("lenders: 5", "lenders holds no lines"),
        ("lenders: {client/a: lenders/x}", "lenders.client/a is no line"),
        ("lenders: {client/a: [x]}", "lenders.client/a: x: must be lenders/NAME"),
        ("lenders: {boss: [lenders/*]}", "boss: must be client/NAME"),
        ("who: {}", "unknown section who"),
        ("methods: {a.B/C: [kings]}", "no such role: kings"),
        ("methods: {a.B: [clients]}", "must be package.Service/Method"),
        ("roles: {clients: [client/*/x]}", "client/*/x: must be"),
        ("{", "is no YAML"),
    ],
)
def test_a_table_that_cannot_be_used_stops_the_start(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "access.yaml"
    file.write_text(content)
    with pytest.raises(WrongSetting) as wrong:
        load_table("INTAKE_ACCESS__TABLE_FILE", str(file))
    assert "INTAKE_ACCESS__TABLE_FILE" in str(wrong.value)
    assert said in str(wrong.value)


def test_denials_are_logged_once_a_minute_and_remembered_in_bounds() -> None:
    clock = FakeClock()
    door = Door(shipped(), None, "loanmesh", clock)

    def knock(name: str = "local") -> None:
        facts = {"peer_spiffe_id": [f"spiffe://loanmesh/client/{name}".encode()]}
        with pytest.raises(NotAllowed):
            door.enter(facts, {}, BUREAU)

    with capture_logs() as logs:
        for _ in range(100):
            knock()
        clock.advance(61.0)
        knock()
    assert [(one["event"], one["caller"], one["unsaid_before"]) for one in logs] == [
        ("access_denied", "client/local", 0),
        ("access_denied", "client/local", 99),
    ]
    for number in range(KINDS_MAX + 50):
        knock(f"c{number}")
    assert len(door._said) == KINDS_MAX
