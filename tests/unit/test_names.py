"""The name server of `up`: questions as a resolver sends them, and packets that are none."""

from __future__ import annotations

import contextlib
import struct

import pytest
from hypothesis import given
from hypothesis.strategies import binary

from loanmesh.cli.names import answer, target

REPLICAS = {"bureau": ["127.0.0.1", "127.0.0.2"], "pricing": []}
A, AAAA = 1, 28


def a_question(name: str, kind: int = A) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\x12\x34" + struct.pack("!HHHHH", 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def addresses(reply: bytes) -> list[str]:
    """The addresses at the end of a reply: 16 bytes a record, the last four the address."""
    count = struct.unpack_from("!H", reply, 6)[0]
    records = [reply[len(reply) - 16 * (count - i) :][:16] for i in range(count)]
    return [".".join(str(byte) for byte in record[12:]) for record in records]


def code(reply: bytes) -> int:
    return int(struct.unpack_from("!H", reply, 2)[0]) & 0xF


@pytest.mark.parametrize("name", ["bureau.loanmesh", "BUREAU.Loanmesh", "bureau.loanmesh.corp.example", "bureau"])
def test_a_service_leads_to_all_its_replicas(name: str) -> None:
    question = a_question(name)
    reply = answer(question, REPLICAS.get)
    assert reply[:2] == question[:2]
    assert question[12:] in reply
    assert (code(reply), addresses(reply)) == (0, REPLICAS["bureau"])


def test_other_types_and_services_without_replicas_have_no_addresses_but_exist() -> None:
    for question in (a_question("bureau.loanmesh", AAAA), a_question("pricing.loanmesh")):
        reply = answer(question, REPLICAS.get)
        assert (code(reply), addresses(reply)) == (0, [])


def test_other_names_do_not_exist() -> None:
    assert code(answer(a_question("moon.loanmesh"), REPLICAS.get)) == 3


@given(binary(max_size=80))
def test_whatever_comes_in_is_answered_or_refused(packet: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert answer(packet, REPLICAS.get)[:2] == packet[:2]


def test_a_question_cut_short_is_refused() -> None:
    whole = a_question("bureau.loanmesh")
    for length in range(len(whole)):
        with pytest.raises(ValueError, match="cut short"):
            answer(whole[:length], REPLICAS.get)


def test_the_target_is_what_grpc_understands() -> None:
    assert target(7401, "bureau", 7402) == "dns://127.0.0.1:7401/bureau.loanmesh:7402"
