"""Every file that we read, mutated thousands of times: refused with a clear error, or accepted and working.

Read by the services' own readers, in this process: to start a service for each would take days.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import io
import math
import os
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest, Pricing
from lending.scoring.v1.scoring_service_pb2 import Score
from lending.type.v1.party_pb2 import Party

from lab.fuzz import key_files, texts
from lab.fuzz.refused import Refused
from lab.population import Kind, Population
from lab.rows import Row, at_least, at_most
from loanmesh.promotion.file import read_promotion
from loanmesh.promotion.wrong import WrongFile
from loanmesh.runtime.authorisation import load_table
from loanmesh.runtime.errors import InvalidRequest
from loanmesh.runtime.setting_file import FILE
from loanmesh.runtime.setting_rules import WrongSetting
from loanmesh.runtime.settings import load
from services.bureau.profile import Answer, report
from services.bureau.settings import BureauSettings
from services.bureau.sources import load_sources
from services.intake.settings import IntakeSettings
from services.pricing.decide import price
from services.pricing.policy import PARTS, PolicyError, load_policy, parse_policy
from services.pricing.settings import PricingSettings
from services.scoring.calibration import grade, probability
from services.scoring.model import ModelError, parse_model
from services.scoring.scorecard import contributions, log_odds
from services.scoring.settings import ScoringSettings

NOW = dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC)
REFUSAL_CHARS_MAX = 20_000
"""A refusal longer than that is no clear error."""
SETTINGS = """\
intake:
  server: {listen: "127.0.0.1:7401", drain_s: 10, max_message_mib: 8, limits: {streams_max: 2000, handshake_s: 10.0}}
  database_url: sqlite:///var/intake.db
  lease:
    duration_s: 10.0
    poll_s: 0.2
  work: {batch_max: 64, batches_in_flight: 8, held_max: 1024, decides: true}
  quota:
    a_second: 0.0
    clients:
      shop: {a_second: 10, burst: 20}
  parking: {attempts_max: 5, mass_share: 0.2}
bureau:
  sources_url: http://127.0.0.1:7405
  brownout:
    serve_cached: {enter_at: 0.5, leave_below: 0.1, calm_s: 2.0}
    optional: [bank_flow]
scoring:
  consumer_model: consumer-2026-11
pricing:
  policy: cn-demo-2026-11
  telemetry:
    sample_ratio: 0.05
    log_level: info
"""
PROMOTION = """\
name: double-twelve
timezone: Asia/Shanghai
start: 2026-12-12T20:00:00
peak_s: 1800
end: 2026-12-12T23:30:00
decide_within_s: 60
new_subjects: 0.8
channels:
  app: {usual_a_second: 8, peak_a_second: 700}
  partner: {usual_a_second: 2, peak_a_second: 250, priority: partner, kinds: {person: 0.8, firm: 0.2}}
sources:
  central_bank: {a_second: 1000}
databases:
  intake: {max_connections: 400, reserved: 10, a_replica: 4}
boot_s: 40
utilisation: 0.7
replicas:
  intake: {usual: 2, most: 8}
  intake-worker: {usual: 2, most: 24}
  bureau: {usual: 2, most: 12}
  scoring: {usual: 2, most: 8}
  pricing: {usual: 2, most: 8}
"""
Reader = Callable[[bytes], None]
Say = Callable[[str], None]


@dataclass
class Found:
    """What the mutants of one file led to."""

    refused: int = 0
    accepted: int = 0
    unexpected: list[str] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)


# --- Readers: raise Refused, or return when the file was accepted and works ---


def settings_file(data: bytes) -> None:
    """The file that LOANMESH_CONFIG names, read for each service."""
    with _file(data, ".yaml") as path, _environment(FILE, str(path)):
        for kind in (IntakeSettings, BureauSettings, ScoringSettings, PricingSettings):
            told = io.StringIO()
            try:
                with contextlib.redirect_stderr(told):
                    load(kind)
            except SystemExit as end:
                if end.code != 2:
                    raise
                raise Refused(told.getvalue()) from end


def policy_file(part: str) -> Reader:
    """One file of a version of policy; the others are as shipped."""
    folder = resources.files("services.pricing") / "policies" / PricingSettings().policy
    shipped = {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in PARTS}

    def read(data: bytes) -> None:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused("is not UTF-8") from error  # Whoever reads the folder says so.
        try:
            policy = parse_policy("mutant", {**shipped, part: text})
        except PolicyError as error:
            raise Refused(str(error)) from error
        for item in _items():
            with contextlib.suppress(InvalidRequest):  # A product that is not offered any more.
                pricing = price(item, policy, NOW)
                assert pricing.outcome != Pricing.OUTCOME_UNSPECIFIED
                assert all(offer.principal_fen > 0 and offer.term_months > 0 for offer in pricing.offers)

    return read


def model_file(name: str) -> Reader:
    """A model's file."""

    def read(data: bytes) -> None:
        try:
            model = parse_model(name, data, "")
        except ModelError as error:
            raise Refused(str(error)) from error
        dice = np.random.default_rng(1)
        rows = np.vstack([
            np.full(len(model.terms), np.nan), np.zeros(len(model.terms)), dice.normal(0, 1e9, (6, len(model.terms))),
        ])  # fmt: skip
        for total in log_odds(model, contributions(model, rows)):
            assert math.isfinite(total)
            assert grade(probability(float(total)), model.bands) in "ABCDE"

    return read


def promotion_file(data: bytes) -> None:
    """A promotion."""
    with _file(data, ".yaml") as path:
        try:
            read_promotion(path)
        except WrongFile as error:
            raise Refused(str(error)) from error


def access_table(data: bytes) -> None:
    """The table of who may call what."""
    with _file(data, ".yaml") as path:
        try:
            load_table("ACCESS__TABLE_FILE", str(path))
        except WrongSetting as error:
            raise Refused(str(error)) from error


@lru_cache(maxsize=1)
def _items() -> list[PriceApplicationsRequest.Item]:
    """A few to price, with all facts and a score."""
    found = []
    people = Population(seed=1)
    kinds: tuple[tuple[Kind, Party.Kind.ValueType, str], ...] = (
        ("person", Party.KIND_PERSON, "consumer_instalment"), ("firm", Party.KIND_FIRM, "firm_credit"),
    )  # fmt: skip
    shipped = load_policy(PricingSettings().policy)
    for kind, party_kind, _ in kinds:
        product = next(p.name for p in shipped.products.values() if p.party == kind)
        for number in range(3):
            subject = people.subject(kind, number)
            item = PriceApplicationsRequest.Item(key="k", lender="lenders/demo", party_kind=party_kind, age_years=40)
            item.loan.product, item.loan.amount_fen, item.loan.term_months = product, 5_000_000, 12
            item.loan.purpose, item.loan.purpose_kind = "装修房屋", item.loan.PURPOSE_KIND_CONSUMPTION
            item.declaration.monthly_income_fen = 1_500_000
            item.score.CopyFrom(Score(pd=0.02 + 0.05 * number, grade="ABC"[number], points=600))
            now_s = NOW.timestamp()
            for source in load_sources().values():
                facts = {name: value for name, value in subject.facts.items() if name in source.types[kind]}
                item.profile.reports.append(report(source, Answer(True, facts, now_s, now_s), now_s))
            found.append(item)
    return found


# --- Mutants ---


def kinds() -> dict[str, tuple[str, Callable[[str, random.Random], bytes], Reader]]:
    """Each kind of file: what it is when sound, how it is mutated, how it is read."""
    policies = resources.files("services.pricing") / "policies" / PricingSettings().policy
    models = resources.files("services.scoring") / "artefacts"
    access = (resources.files("loanmesh.runtime") / "access.yaml").read_text(encoding="utf-8")
    found: dict[str, tuple[str, Callable[[str, random.Random], bytes], Reader]] = {
        "settings": (SETTINGS, texts.yaml, settings_file),
        "promotion": (PROMOTION, texts.yaml, promotion_file),
        "access table": (access, texts.yaml, access_table),
    }
    for part in PARTS:
        text = (policies / f"{part}.yaml").read_text(encoding="utf-8")
        found[f"policy {part}"] = (text, texts.yaml, policy_file(part))
    for name in (ScoringSettings().consumer_model, ScoringSettings().firm_model):
        text = (models / f"{name}.json").read_text(encoding="utf-8")
        found[f"model {name}"] = (text, texts.json_file, model_file(name))
    return found | key_files.kinds()


def fuzz(name: str, seed: int, count: int) -> Found:
    """So many mutants of one kind of file."""
    text, mutate, read = kinds()[name]
    found = Found()
    for number in range(count):
        data = mutate(text, random.Random(f"{seed}:{name}:{number}"))
        try:
            read(data)
            found.accepted += 1
        except Refused as refused:
            found.refused += 1
            if fault := _unclear(str(refused)):
                found.unexpected.append(f"number {number}: {fault}: {str(refused)[:200]!r}")
        except BaseException as error:  # What no reader may raise is looked for, and a panic of Rust's is no Exception.
            if isinstance(error, KeyboardInterrupt):
                raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            cause = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            found.causes[cause] += 1
            found.unexpected.append(f"number {number}: {cause}: {str(error)[:200]}")
    return found


def _unclear(refusal: str) -> str:
    if not refusal.strip():
        return "says nothing"
    if "Traceback" in refusal or len(refusal) > REFUSAL_CHARS_MAX:
        return "is no clear error"
    return ""


def run(seed: int, count: int, say: Say) -> list[Row]:
    """All kinds of files, so many mutants each."""
    found: dict[str, Found] = {}
    for name in kinds():
        one = found[name] = fuzz(name, seed, count)
        say(f"{name}: refused {one.refused}, accepted and working {one.accepted}, unexpected {len(one.unexpected)}")
        for line in one.unexpected[:3]:
            say(f"    seed {seed}, {line}")
        for cause, times in one.causes.most_common(8):
            say(f"    {times} x {cause}")
    return [
        at_least("mutants a file", min(one.refused + one.accepted for one in found.values()), "mutants", count),
        at_least("kinds of files", len(found), "kinds", len(kinds())),
        at_most("mutants neither refused clearly nor working", _sum(found), "mutants", 0),
    ]


def sound(name: str) -> None:
    """Read the kind of file as it is when sound. Raises Refused, or what its reader lets through."""
    text, _, read = kinds()[name]
    read(text.encode())


def _sum(found: Mapping[str, Found]) -> int:
    return sum(len(one.unexpected) for one in found.values())


@contextlib.contextmanager
def _file(data: bytes, suffix: str) -> Iterator[Path]:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        yield Path(file.name)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
