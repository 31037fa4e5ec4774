"""A synthetic population of any size, the same for the same seed: each subject is drawn from its number alone.

Attributes follow the quantiles and rank correlations measured on real data (population.json) through a Gaussian
copula. What the data sets do not hold (court, registry, bank flow, overdue now) follows the rates named below, which
are our own assumptions, chosen so that outcomes are a believable mix.
"""

from __future__ import annotations

import datetime as dt
import json
import math
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any, Literal

import numpy as np

from lab.identity import credit_code, resident_id

Kind = Literal["person", "firm"]
SOURCES = ("central_bank", "tax", "registry", "court", "bank_flow")
_YEAR_ZERO = dt.date(2026, 1, 1)
_P_ENFORCEMENT, _P_DISHONEST, _P_OVERDUE_NOW, _P_INACTIVE = 0.02, 0.01, 0.02, 0.01
_INDUSTRIES = ("F5191", "C2199", "E4990", "I6510", "G5430", "L7291", "O8090", "A0149")
_PURPOSES = {
    "person": ("装修房屋", "购买家电", "子女教育费用", "旅行", "医疗支出"),
    "firm": ("采购原材料", "支付工人工资", "扩大库存", "购买设备配件", "补充流动资金"),
}


@dataclass(frozen=True)
class Subject:
    """One member of the population."""

    index: int
    kind: Kind
    identity: str
    facts: dict[str, Any]
    """Every attribute, under dictionary names; plus age_years and declared.* for persons."""
    registered: bool
    """Whether the central bank's register knows them."""


class Population:
    """Subjects by number."""

    def __init__(self, seed: int = 1) -> None:
        self._seed = seed
        read = json.loads((resources.files("lab") / "population.json").read_text(encoding="utf-8"))
        self._shape = {kind: _Shape(read[kind]) for kind in ("person", "firm")}

    @lru_cache(maxsize=20_000)  # noqa: B019  One population a process.
    def subject(self, kind: Kind, index: int) -> Subject:
        """The subject; always the same for seed, kind and number."""
        dice = np.random.default_rng([self._seed, index, int(kind == "firm")])
        drawn = self._shape[kind].draw(dice)
        return _person(index, drawn, dice) if kind == "person" else _firm(index, drawn, dice)

    def application(self, kind: Kind, index: int, now: dt.datetime) -> dict[str, Any]:
        """The application this subject would send, as the JSON form of lending.intake.v1.Application."""
        subject = self.subject(kind, index)
        dice = np.random.default_rng([self._seed, index, 2 + int(kind == "firm")])
        return application_for(subject, dice, now)


class _Shape:
    """A joint distribution: quantiles an attribute, and the correlation of their normal scores."""

    def __init__(self, read: dict[str, Any]) -> None:
        self._order: list[str] = read["order"]
        self._quantiles = [np.array(read["attributes"][name]) for name in self._order]
        correlation = np.array(read["correlation"]) + np.eye(len(self._order)) * 0.02
        self._root = np.linalg.cholesky(correlation / correlation[0, 0])

    def draw(self, dice: np.random.Generator) -> dict[str, float]:
        normal = self._root @ dice.standard_normal(len(self._order))
        at = [(0.5 * (1 + math.erf(z / math.sqrt(2)))) for z in normal]
        grid = np.linspace(0.005, 0.995, 51)
        return {
            name: float(np.interp(u, grid, quantiles))
            for name, u, quantiles in zip(self._order, at, self._quantiles, strict=True)
        }


def _person(index: int, drawn: dict[str, float], dice: np.random.Generator) -> Subject:
    age = int(min(75, max(20, drawn["age_years"])))
    born = _YEAR_ZERO - dt.timedelta(days=age * 365 + int(dice.integers(0, 365)))
    income = max(200_000, round(drawn["declared.monthly_income_fen"]))
    debt_ratio = min(drawn["credit.debt_ratio"], 3.0)
    often_late = drawn["credit.overdue_90_count"] >= 1
    counts = ("overdue_30_59_count", "overdue_60_89_count", "overdue_90_count", "open_lines", "real_estate_loans")
    facts: dict[str, Any] = {
        "credit.revolving_utilisation": round(drawn["credit.revolving_utilisation"], 4),
        "credit.debt_ratio": round(debt_ratio, 4),
        **{f"credit.{name}": round(drawn[f"credit.{name}"]) for name in counts},
        "credit.monthly_payment_fen": round(income * debt_ratio),
        "credit.outstanding_fen": round(income * debt_ratio * 24),
        "credit.current_overdue_fen": _overdue(dice, income // 4, 10 if often_late else 1),
        "tax.annual_income_fen": round(income * 12 * dice.uniform(0.85, 1.05)),
        "registry.revoked_firms_count": int(dice.random() < 0.01),
        **_court(dice, 4 if often_late else 1),
        "bank.monthly_inflow_fen": round(income * dice.uniform(0.8, 1.2)),
        "bank.months_covered": 12,
        "declared.monthly_income_fen": income // 100 * 100,
        "declared.dependents": round(drawn["declared.dependents"]),
        "age_years": age,
    }
    return Subject(index, "person", resident_id(index, born), facts, registered=bool(dice.random() > 0.03))


def _firm(index: int, drawn: dict[str, float], dice: np.random.Generator) -> Subject:
    facts: dict[str, Any] = {}
    for name, value in drawn.items():
        whole = name.endswith(("_fen", "_count", "_12m", "months_active"))
        facts[name] = round(value) if whole else round(value, 6)
    facts |= {
        "credit.overdue_90_count": int(dice.random() < 0.03),
        "credit.current_overdue_fen": _overdue(dice, 5_000_000, 1),
        "credit.outstanding_fen": round(max(0, drawn["tax.sales_12m_fen"]) * dice.uniform(0, 0.2)),
        "registry.is_active": bool(dice.random() > _P_INACTIVE),
        "registry.age_months": facts["tax.months_active"] + int(dice.integers(1, 120)),
        "registry.registered_capital_fen": int(dice.choice([10, 50, 100, 500, 1000])) * 1_000_000,
        "registry.industry": str(dice.choice(_INDUSTRIES)),
        **_court(dice, 1),
        "bank.monthly_inflow_fen": round(max(0, drawn["tax.sales_12m_fen"]) / 12 * dice.uniform(0.8, 1.15)),
        "bank.months_covered": 12,
    }
    return Subject(index, "firm", credit_code(index), facts, registered=bool(dice.random() > 0.4))


def _overdue(dice: np.random.Generator, amount_fen: int, times: int) -> int:
    return int(dice.uniform(0.2, 1) * amount_fen) if dice.random() < _P_OVERDUE_NOW * times else 0


def _court(dice: np.random.Generator, times: int) -> dict[str, Any]:
    return {
        "court.enforcement_open_count": int(dice.random() < _P_ENFORCEMENT * times),
        "court.is_dishonest_debtor": bool(dice.random() < _P_DISHONEST * times),
    }


def application_for(subject: Subject, dice: np.random.Generator, now: dt.datetime) -> dict[str, Any]:
    """What the subject asks for, as JSON."""
    person = subject.kind == "person"
    facts = subject.facts
    if person:
        asked = facts["declared.monthly_income_fen"] * dice.uniform(0.5, 6)
        amount = int(min(20_000_000, max(100_000, asked))) // 10_000 * 10_000
        declaration: dict[str, Any] = {
            "monthlyIncomeFen": str(facts["declared.monthly_income_fen"]),
            "dependents": facts["declared.dependents"],
            "region": "990000",
        }
    else:
        asked = max(0, facts["tax.sales_12m_fen"]) * dice.uniform(0.03, 0.3)
        amount = int(min(100_000_000, max(10_000_000, asked))) // 100_000 * 100_000
        turnover = max(0, facts["tax.sales_12m_fen"]) // 10_000 * 10_000
        declaration = {"annualTurnoverFen": str(turnover), "industry": facts["registry.industry"], "region": "990000"}
    return application_json(
        subject.kind, subject.identity, amount, int(dice.choice([6, 12, 24, 36] if person else [6, 12])),
        str(dice.choice(_PURPOSES[subject.kind])), declaration, now, "app" if person else "partner-demo",
    )  # fmt: skip


def application_json(
    kind: Kind, identity: str, amount_fen: int, term_months: int, purpose: str, declaration: dict[str, Any],
    now: dt.datetime, channel: str,
) -> dict[str, Any]:  # fmt: skip
    """An application with consents for all sources, as JSON."""
    person = kind == "person"
    given = (now - dt.timedelta(minutes=10)).strftime("%Y-%m-%dT%H:%M:00Z")
    identity_kind = "KIND_RESIDENT_ID" if person else "KIND_UNIFIED_SOCIAL_CREDIT_CODE"
    return {
        "parties": [
            {
                "role": "ROLE_BORROWER",
                "kind": "KIND_PERSON" if person else "KIND_FIRM",
                "identity": {"kind": identity_kind, "value": identity},
            }
        ],
        "loan": {
            "amountFen": str(amount_fen),
            "termMonths": term_months,
            "purpose": purpose,
            "purposeKind": "PURPOSE_KIND_CONSUMPTION" if person else "PURPOSE_KIND_WORKING_CAPITAL",
        },
        "declaration": declaration,
        "consents": [
            {"source": source, "purpose": "PURPOSE_CREDIT_ASSESSMENT", "givenTime": given} for source in SOURCES
        ],
        "channel": channel,
        "priority": "PRIORITY_INTERACTIVE" if person else "PRIORITY_PARTNER",
    }
