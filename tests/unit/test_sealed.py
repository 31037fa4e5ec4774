"""Sealing: only the right key opens a blob, only at its place; rotation leaves the content alone."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis.strategies import binary

from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.errors import DependencyDown
from loanmesh.runtime.keys import KeyRing, Keys, KeySet, new_key, new_ring
from loanmesh.runtime.sealed import Sealer, Unsealable, is_sealed

CLOCK = FakeClock()
PLACE = "lenders/demo/applications/1"


def a_sealer(ring: KeyRing | None = None) -> Sealer:
    return Sealer(Keys(ring or new_ring(CLOCK.now()), CLOCK))


def rotated(ring: KeyRing) -> KeyRing:
    """With one more key a purpose, in use since a moment ago."""
    now = CLOCK.now()
    seal, look_up = new_key("seal", now), new_key("look_up", now)
    older = [
        KeySet(tuple(type(key)(key.id, now - dt.timedelta(days=1), key.secret) for key in keys.keys))
        for keys in (ring.seal, ring.look_up)
    ]
    return KeyRing(KeySet((*older[0].keys, seal)), KeySet((*older[1].keys, look_up)))


@given(plain=binary(max_size=2000))
def test_what_was_sealed_is_read_again(plain: bytes) -> None:
    key = a_sealer().new_key(PLACE)
    blob = key.seal(plain, f"{PLACE}/payload")
    assert is_sealed(blob)
    assert key.unseal(blob, f"{PLACE}/payload") == plain


def test_the_plain_bytes_are_not_in_the_blob_and_no_two_blobs_are_alike() -> None:
    key = a_sealer().new_key(PLACE)
    one, other = (key.seal(b"990001199001011234", PLACE) for _ in range(2))
    assert b"990001199001011234" not in one
    assert one != other


def test_a_blob_is_read_at_its_own_place_only() -> None:
    key = a_sealer().new_key(PLACE)
    blob = key.seal(b"said", f"{PLACE}/payload")
    with pytest.raises(Unsealable, match="original"):
        key.unseal(blob, f"{PLACE}/original")


@pytest.mark.parametrize("at", [2, 13, 14, 20, -1])
def test_a_changed_byte_shows(at: int) -> None:
    key = a_sealer().new_key(PLACE)
    blob = bytearray(key.seal(b"said so", PLACE))
    blob[at] ^= 1
    with pytest.raises(Unsealable):
        key.unseal(bytes(blob), PLACE)


def test_a_data_key_is_opened_for_its_own_application_only() -> None:
    sealer = a_sealer()
    key = sealer.new_key(PLACE)
    blob = key.seal(b"said", PLACE)
    assert sealer.open_key(key.key_id, key.wrapped, PLACE).unseal(blob, PLACE) == b"said"
    with pytest.raises(Unsealable):
        sealer.open_key(key.key_id, key.wrapped, "lenders/demo/applications/2")


def test_after_a_rotation_old_content_is_read_and_wrapped_anew_without_being_touched() -> None:
    ring = new_ring(CLOCK.now())
    old = a_sealer(ring).new_key(PLACE)
    blob = old.seal(b"said", PLACE)
    newer = a_sealer(rotated(ring))
    assert newer.open_key(old.key_id, old.wrapped, PLACE).unseal(blob, PLACE) == b"said"
    moved = newer.rewrap(old.key_id, old.wrapped, PLACE)
    assert moved.key_id != old.key_id
    without_the_old = a_sealer(KeyRing(KeySet(newer.keys.ring.seal.keys[-1:]), newer.keys.ring.look_up))
    assert without_the_old.open_key(moved.key_id, moved.wrapped, PLACE).unseal(blob, PLACE) == b"said"


def test_what_is_sealed_with_a_key_that_is_not_here_waits_for_it() -> None:
    key = a_sealer().new_key(PLACE)
    with pytest.raises(DependencyDown, match=key.key_id):
        a_sealer().open_key(key.key_id, key.wrapped, PLACE)


def test_a_subject_is_found_under_each_key_and_differs_by_lender() -> None:
    ring = new_ring(CLOCK.now())
    before, after = a_sealer(ring), a_sealer(rotated(ring))
    number = "990001199001011234"
    assert after.subjects("lenders/demo", number) == [
        after.subject("lenders/demo", number), before.subject("lenders/demo", number)
    ]  # fmt: skip
    assert before.subject("lenders/demo", number) != before.subject("lenders/other", number)
    assert before.subject("lenders/demo", number) != a_sealer().subject("lenders/demo", number)


def test_a_fingerprint_holds_over_a_rotation_and_tells_what_differs() -> None:
    ring = new_ring(CLOCK.now())
    print_ = a_sealer(ring).fingerprint(b"said")
    after = a_sealer(rotated(ring))
    assert after.is_print_of(print_, b"said")
    assert not after.is_print_of(print_, b"said otherwise")
    with pytest.raises(DependencyDown):
        a_sealer().is_print_of(print_, b"said")


def test_a_derived_key_needs_no_storing() -> None:
    sealer = a_sealer()
    key = sealer.row_key(PLACE)
    blob = key.seal(b"said", PLACE)
    assert sealer.open_row_key(key.key_id, PLACE).unseal(blob, PLACE) == b"said"
    with pytest.raises(Unsealable):
        sealer.open_row_key(key.key_id, "elsewhere").unseal(blob, PLACE)
