"""Bytes that unfold to more than a replica has, told from large but sound requests before they are parsed."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from lending.intake.v1 import intake_service_pb2 as pb
from lending.type.v1.party_pb2 import Party

from lab.population import Population
from loanmesh.runtime.unfolding import COUNTED_FROM_BYTES, fields, is_too_much

NOW = dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC)
KIND = pb.BatchSubmitApplicationsRequest.DESCRIPTOR


def a_batch(items: int) -> pb.BatchSubmitApplicationsRequest:
    application = json_format.ParseDict(Population().application("person", 1, NOW), pb.Application())
    return pb.BatchSubmitApplicationsRequest(
        parent="lenders/demo", requests=[pb.SubmitApplicationRequest(application=application)] * items
    )


def test_the_largest_sound_batch_is_taken() -> None:
    batch = a_batch(1)
    item = batch.requests[0]
    item.application.loan.purpose = "装" * 500
    item.application.parties.extend([Party(legal_name="名" * 200)] * 9)
    item.application.consents.extend([item.application.consents[0]] * (50 - len(item.application.consents)))
    batch.requests.extend([item] * 499)
    data = batch.SerializeToString()
    assert len(data) > COUNTED_FROM_BYTES
    assert not is_too_much(data, KIND)


def within(*numbers: int) -> Callable[[bytes], bytes]:
    """What puts bytes into fields of these numbers, the first of them outermost."""

    def put(content: bytes) -> bytes:
        for number in reversed(numbers):
            size, length = len(content), b""
            while size > 127:
                length, size = length + bytes([size & 127 | 128]), size >> 7
            head = bytes([number << 3 | 2]) if number < 16 else bytes([number << 3 & 127 | 2 | 128, number >> 4])
            content = head + length + bytes([size]) + content
        return content

    return put


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x12\x00" * 600_000,
        b"\x12\x02\x32\x00" * 400_000,
        b"\x78\x01" * 600_000,
        b"\x9b\x06\x9c\x06" * 400_000,
        within(2, 3)(b"\x32\x00" * 600_000),
        within(2, 3, 17)(b"\x1a\x00" * 600_000),
    ],
    ids=["items", "items with something", "unknown numbers", "unknown groups", "consents", "offers"],
)
def test_a_bomb_is_told(bomb: bytes) -> None:
    assert is_too_much(bomb, KIND)


def test_counting_ends_where_it_knows_enough() -> None:
    assert fields(b"\x12\x00" * 1000, KIND, 10) == 11


@given(st.binary(max_size=60))
def test_any_bytes_are_counted_to_an_end(data: bytes) -> None:
    assert 0 <= fields(data, KIND, 1000) <= 60


def test_fields_are_counted_at_every_level() -> None:
    batch = pb.BatchSubmitApplicationsRequest(parent="x", requests=[pb.SubmitApplicationRequest(request_id="y")] * 2)
    assert fields(batch.SerializeToString(), KIND, 100) == 5
