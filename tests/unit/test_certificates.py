"""Certificates in files, and the CA that makes them."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtensionOID, NameOID
from structlog.testing import capture_logs
from typer.testing import CliRunner

from loanmesh.cli.authority import Authority, CannotIssue, Subject
from loanmesh.cli.main import app
from loanmesh.runtime.certificates import BadCertificate, ExpiryWatch, Files, Watched, read
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.handshake import WORDS

RUNNER = CliRunner()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def authority(tmp_path: Path, clock: FakeClock) -> Authority:
    made = Authority(tmp_path / "certs", clock.now)
    made.create("loanmesh")
    return made


@pytest.mark.parametrize(
    ("subject", "identity", "names"),
    [
        (
            Subject("service", "bureau", dns=("bureau.example",)),
            "spiffe://loanmesh/ns/loanmesh/sa/bureau",
            ["bureau", "bureau.loanmesh", "bureau.loanmesh.svc", "localhost", "bureau.example"],
        ),
        (Subject("client", "shop"), "spiffe://loanmesh/client/shop", []),
        (Subject("operator", "ann"), "spiffe://loanmesh/operator/ann", []),
    ],
)
def test_a_certificate_states_who_it_is_for(
    authority: Authority, clock: FakeClock, subject: Subject, identity: str, names: list[str]
) -> None:
    folder = authority.issue(subject)
    material = read(Files.in_folder(folder))
    assert material.identity == identity
    assert material.left_s(clock.now()) == 24 * 3600
    assert material.is_believed()
    leaf = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    stated = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert stated.get_values_for_type(x509.DNSName) == names


def test_keys_are_their_owners_only(authority: Authority, tmp_path: Path) -> None:
    authority.issue(Subject("client", "shop"))
    keys = list((tmp_path / "certs").rglob("*.key"))
    assert len(keys) == 2
    assert [stat.S_IMODE(key.stat().st_mode) for key in keys] == [0o600, 0o600]


def test_nothing_is_replaced_without_being_told(authority: Authority) -> None:
    folder = authority.issue(Subject("client", "shop"))
    before = (folder / "tls.crt").read_bytes()
    with pytest.raises(CannotIssue, match="--overwrite"):
        authority.issue(Subject("client", "shop"))
    with pytest.raises(CannotIssue, match="rotate-ca"):
        authority.create("loanmesh")
    assert (folder / "tls.crt").read_bytes() == before


def test_renewing_keeps_who_it_is_and_for_how_long(authority: Authority, clock: FakeClock) -> None:
    folder = authority.issue(Subject("service", "bureau", "spring", ("b.example",)), dt.timedelta(hours=6))
    authority.issue(Subject("client", "shop"))
    clock.advance(3 * 3600)
    assert authority.renew(all_=False) == []
    clock.advance(2 * 3600)
    assert authority.renew(all_=False) == [folder]
    material = read(Files.in_folder(folder))
    assert material.identity == "spiffe://loanmesh/ns/spring/sa/bureau"
    assert material.left_s(clock.now()) == 6 * 3600
    leaf = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    stated = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert stated.get_values_for_type(x509.DNSName) == [
        "bureau", "bureau.loanmesh", "bureau.spring.svc", "localhost", "b.example",
    ]  # fmt: skip


def test_a_ca_is_replaced_in_steps_that_cannot_be_taken_in_the_wrong_order(authority: Authority) -> None:
    folder = authority.issue(Subject("client", "shop"))
    authority.replace()
    with pytest.raises(CannotIssue, match="renew --all"):
        authority.retire()
    with pytest.raises(CannotIssue, match="retire-ca"):
        authority.replace()
    assert (folder / "ca.crt").read_bytes().count(b"BEGIN CERTIFICATE") == 2
    assert read(Files.in_folder(folder)).is_believed()
    authority.renew(all_=True)
    assert authority.retire() == 1
    assert (folder / "ca.crt").read_bytes().count(b"BEGIN CERTIFICATE") == 1
    assert read(Files.in_folder(folder)).is_believed()


def test_a_certificate_never_outlives_its_ca(tmp_path: Path, clock: FakeClock) -> None:
    authority = Authority(tmp_path, clock.now)
    authority.create("loanmesh", dt.timedelta(hours=1))
    assert read(Files.in_folder(authority.issue(Subject("client", "shop")))).left_s(clock.now()) == 3600


# --- Files ---


def test_files_that_cannot_be_used_are_named_with_why(authority: Authority, tmp_path: Path) -> None:
    shop, other = authority.issue(Subject("client", "shop")), authority.issue(Subject("client", "other"))
    for files, role, why in (
        (Files(tmp_path / "none"), "ca", "No such file"),
        (Files(shop / "tls.key"), "ca", "holds no certificate"),
        (Files(shop / "ca.crt", shop / "tls.crt", other / "tls.key"), "key", "is not the key of"),
        (Files(shop / "ca.crt", shop / "tls.crt", shop / "tls.crt"), "key", "no unencrypted private key"),
        (Files(shop / "ca.crt", shop / "tls.key", shop / "tls.key"), "certificate", "holds no certificate"),
    ):
        with pytest.raises(BadCertificate, match=why) as bad:
            read(files)
        assert bad.value.role == role


def test_a_certificate_whose_names_cannot_be_parsed_changes_nothing(authority: Authority, clock: FakeClock) -> None:
    folder = authority.issue(Subject("client", "shop"))
    watched = Watched(Files.in_folder(folder))
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "shop")])
    names = x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\xff\xff")
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, clock.now(), clock.now() + dt.timedelta(7))
    broken = builder.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (folder / "tls.crt").write_bytes(broken.public_bytes(Encoding.PEM))
    (folder / "tls.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(BadCertificate, match="cannot be read: ValueError"):
        read(Files.in_folder(folder))
    assert not watched.look()
    assert watched.material.identity


def test_half_a_replacement_changes_nothing_until_it_is_whole(authority: Authority) -> None:
    folder = authority.issue(Subject("client", "shop"))
    watched = Watched(Files.in_folder(folder))
    before = watched.material
    assert not watched.look()
    old_key = (folder / "tls.key").read_bytes()
    authority.issue(Subject("client", "shop"), overwrite=True)
    new_key = (folder / "tls.key").read_bytes()
    (folder / "tls.key").write_bytes(old_key)
    with capture_logs() as logs:
        assert not watched.look()
        assert logs == []
        assert not watched.look()
        assert not watched.look()
    assert [one["error_type"] for one in logs] == ["tls_bad_file"]
    assert watched.material is before
    (folder / "tls.key").write_bytes(new_key)
    assert watched.look()
    assert watched.material.certificate_pem != before.certificate_pem


def test_a_turned_symbolic_link_is_noticed_as_a_cluster_turns_it(authority: Authority, tmp_path: Path) -> None:
    first = shutil.copytree(authority.issue(Subject("client", "shop")), tmp_path / "..1")
    second = shutil.copytree(authority.issue(Subject("client", "shop"), overwrite=True), tmp_path / "..2")
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "..data").symlink_to(first)
    for name in ("ca.crt", "tls.crt", "tls.key"):
        (mount / name).symlink_to(f"..data/{name}")
    watched = Watched(Files.in_folder(mount))
    (mount / "..new").symlink_to(second)
    os.replace(mount / "..new", mount / "..data")
    assert watched.look()
    assert watched.material.key_pem == (second / "tls.key").read_bytes()


def test_nobody_prints_a_key(authority: Authority) -> None:
    material = read(Files.in_folder(authority.issue(Subject("client", "shop"))))
    assert "PRIVATE" not in repr(material) + str(material)


def test_expiry_is_warned_of_before_and_told_after(authority: Authority, clock: FakeClock) -> None:
    material = read(Files.in_folder(authority.issue(Subject("client", "shop"))))
    watch = ExpiryWatch(clock.now)
    with capture_logs() as logs:
        for _ in range(26):
            watch.check(material)
            clock.advance(3600)
    assert [(one["event"], one["error_type"]) for one in logs] == [
        ("certificate_expires_soon", "tls_own_certificate_expires"),
        ("certificate_expired", "tls_own_certificate_expired"),
    ]


# --- The command ---


def run(*words: str) -> tuple[int, str]:
    done = RUNNER.invoke(app, ["certs", *words])
    return done.exit_code, done.output


def test_the_command_makes_renews_and_shows(tmp_path: Path) -> None:
    folder = ("--dir", str(tmp_path / "c"))
    assert run("show", *folder)[0] == 4
    assert run("init", *folder)[0] == 0
    assert run("init", *folder)[0] == 4
    code, said = run("issue", "service", "intake", *folder)
    assert code == 0
    assert "INTAKE_TLS__CERT_FILE=" in said
    assert run("issue", "client", "shop", "--hours", "1", *folder)[0] == 0
    assert run("issue", "client", "shop", *folder)[0] == 4
    assert run("issue", "client", "Shop/../..", *folder)[0] == 2
    assert run("issue", "king", "shop", *folder)[0] == 2
    code, said = run("show", "--json", *folder)
    assert code == 0
    assert [one["identity"] for one in json.loads(said)] == [
        "CA of loanmesh", "spiffe://loanmesh/ns/loanmesh/sa/intake", "spiffe://loanmesh/client/shop",
    ]  # fmt: skip
    assert json.loads(run("renew", "--json", *folder)[1]) == {"renewed": []}
    assert len(json.loads(run("renew", "shop", "--all", "--json", *folder)[1])["renewed"]) == 1
    assert run("renew", "nobody", *folder)[0] == 2
    assert run("rotate-ca", *folder)[0] == 0
    assert run("retire-ca", *folder)[0] == 4
    assert run("renew", "--all", *folder)[0] == 0
    assert run("retire-ca", *folder)[0] == 0


def test_the_pages_commands_do_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    commands = re.findall(r"^loanmesh certs ([^#\n]*)", page, re.MULTILINE)
    assert len(commands) == 9
    monkeypatch.setenv("LOANMESH_CERTS", str(tmp_path))
    for command in commands:
        assert run(*command.split())[0] == 0, command


def test_the_page_names_every_error_type() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text(encoding="utf-8")
    assert [cause for cause in WORDS if f"`{cause}`" not in page] == []


def test_show_warns_of_what_expires(tmp_path: Path) -> None:
    yesterday = FakeClock(dt.datetime.now(dt.UTC) - dt.timedelta(days=2))  # noqa: TID251  The command asks the real clock.
    authority = Authority(tmp_path, yesterday.now)
    authority.create("loanmesh")
    authority.issue(Subject("client", "late"))
    code, said = run("show", "--dir", str(tmp_path))
    assert code == 1
    assert "expired" in said
    assert "loanmesh certs renew" in said
