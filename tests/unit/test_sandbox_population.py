"""The population: the same for the same seed, consistent in itself, and a believable mix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from google.protobuf import json_format
from lending.intake.v1.intake_service_pb2 import Application

from lab.identity import credit_code, firm_index, person_index
from lab.population import SOURCES, Kind, Population, Subject
from loanmesh.runtime.clock import FakeClock
from loanmesh.runtime.identity import age_on, valid_credit_code, valid_resident_id
from loanmesh.runtime.validation import violations
from services.bureau.sources import load_sources

NOW = FakeClock().now()
KINDS: tuple[Kind, Kind] = ("person", "firm")


@pytest.fixture(scope="module")
def population() -> Population:
    return Population(seed=1)


def subjects(population: Population, kind: Kind, count: int = 2000) -> Iterator[Subject]:
    return (population.subject(kind, index) for index in range(count))


@pytest.mark.parametrize("kind", KINDS)
def test_a_subject_depends_on_seed_kind_and_number_only(population: Population, kind: Kind) -> None:
    again = Population(seed=1)
    wanted = [again.subject(kind, index) for index in (7, 3, 999_999)]
    assert [population.subject(kind, index) for index in (7, 3, 999_999)] == wanted
    assert Population(seed=2).subject(kind, 7).facts != wanted[0].facts
    assert population.application(kind, 7, NOW) == again.application(kind, 7, NOW)


def test_identities_are_valid_synthetic_and_tell_the_age(population: Population) -> None:
    for subject in subjects(population, "person", 500):
        assert valid_resident_id(subject.identity)
        assert subject.identity.startswith("99")
        assert person_index(subject.identity) == subject.index
        age = age_on(subject.identity, NOW.date())
        assert age is not None
        assert abs(age - subject.facts["age_years"]) <= 1
    for subject in subjects(population, "firm", 500):
        assert valid_credit_code(subject.identity)
        assert firm_index(subject.identity) == subject.index


@pytest.mark.parametrize("kind", KINDS)
def test_every_fact_is_one_its_source_may_state(population: Population, kind: Kind) -> None:
    sources = load_sources()
    for subject in subjects(population, kind, 300):
        read: dict[str, object] = {}
        for source in SOURCES:
            prefix = {"central_bank": "credit.", "bank_flow": "bank."}.get(source, f"{source}.")
            read |= sources[source].read(kind, {n: f for n, f in subject.facts.items() if n.startswith(prefix)})
        assert len(read) == len([n for n in subject.facts if not n.startswith(("declared.", "age_"))])
        assert set(read) == {name for source in sources.values() for name in source.types[kind]}


@pytest.mark.parametrize("kind", KINDS)
def test_applications_keep_the_contract_and_agree_with_the_facts(population: Population, kind: Kind) -> None:
    for index in range(200):
        application = json_format.ParseDict(population.application(kind, index, NOW), Application())
        assert not violations(application)
        assert {consent.source for consent in application.consents} == set(SOURCES)
        facts = population.subject(kind, index).facts
        if kind == "person":
            assert application.declaration.monthly_income_fen == facts["declared.monthly_income_fen"]
        else:
            assert abs(application.declaration.annual_turnover_fen - max(0, facts["tax.sales_12m_fen"])) < 10_000


@pytest.mark.parametrize(
    ("kind", "name", "low", "high"),
    [
        ("person", "court.enforcement_open_count", 0.01, 0.06),
        ("person", "credit.current_overdue_fen", 0.01, 0.06),
        ("firm", "court.is_dishonest_debtor", 0.004, 0.02),
        ("firm", "credit.current_overdue_fen", 0.01, 0.035),
    ],
)
def test_trouble_is_as_common_as_documented(
    population: Population, kind: Kind, name: str, low: float, high: float
) -> None:
    share = sum(bool(subject.facts[name]) for subject in subjects(population, kind)) / 2000
    assert low < share < high


def test_trouble_comes_together(population: Population) -> None:
    late: list[bool] = []
    others: list[bool] = []
    for subject in subjects(population, "person", 4000):
        group = late if subject.facts["credit.overdue_90_count"] else others
        group.append(bool(subject.facts["court.enforcement_open_count"]))
    assert sum(late) / len(late) > 2 * sum(others) / len(others)


def test_codes_of_other_regions_are_nobodys() -> None:
    assert person_index("11010519491231002X") is None
    assert firm_index("91350100M000100Y43") is None
    assert firm_index(credit_code(5)) == 5
