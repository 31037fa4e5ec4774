"""Policy as data: products, rules, caps and market set, read and checked once, with the hash that names them."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from typing import Any, Literal

import cel
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

PartyKind = Literal["person", "firm"]
EXTRA_FACTS = frozenset({"request.purpose_kind", "request.age_years", "score.pd", "policy.pd_max"})
"""What rules can read besides the attributes of the dictionary."""


class PolicyError(Exception):
    """A policy file cannot be used; the text names file, rule and fault."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Strict):
    """Inclusive bounds."""

    min: int
    max: int


class Product(_Strict):
    """One product. Money in fen, rates in ppm a year."""

    name: str = ""
    party: PartyKind
    zh: str
    en: str
    amount_fen: Range
    term_months: Range
    apr_ppm: Range
    horizon_months: int
    pd_max: Decimal
    operating_cost_ppm: int
    margin_ppm: int
    turnover_share: dict[str, Decimal] = {}
    payment_share: dict[str, Decimal] = {}
    sources: tuple[str, ...]
    may_do_without: dict[str, Decimal] = {}
    offer_days: int

    @property
    def apr_min_ppm(self) -> int:
        """Lowest rate."""
        return self.apr_ppm.min

    @property
    def apr_max_ppm(self) -> int:
        """Highest rate."""
        return self.apr_ppm.max


class Market(_Strict):
    """Dated market figures."""

    lpr_1y_ppm: int
    observed_on: dt.date
    funding_spread_ppm: int
    lgd: dict[PartyKind, Decimal]
    capital_ratio: Decimal
    risk_weight: dict[PartyKind, Decimal]
    return_on_capital_ppm: int


class Example(_Strict):
    """A case a rule was written for; the tests run it."""

    given: dict[str, Any]
    fires: bool


class Rule(_Strict):
    """A rule that declines, or a cap that the law sets."""

    code: str
    of: tuple[PartyKind, ...]
    needs: tuple[str, ...] = ()
    declines_if: str = ""
    nearly_if: str = ""
    condition: str = ""
    caps: Literal["", "amount_fen", "term_months", "irr_ppm"] = ""
    value: int = 0
    valid_from: dt.date = dt.date.min
    valid_to: dt.date = dt.date.max
    authority: str = ""
    zh: str
    en: str
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class CompiledRule:
    """A rule with its conditions ready to run."""

    rule: Rule
    declines: Any
    nearly: Any

    def fires(self, facts: Mapping[str, Any]) -> bool:
        """Whether it declines. KeyError when a fact it needs is absent."""
        return bool(self.declines.execute(nested(facts, self.rule.needs)))

    def nearly_fires(self, facts: Mapping[str, Any]) -> bool:
        """Whether it passed, but closer than the policy's margin."""
        return self.nearly is not None and bool(self.nearly.execute(nested(facts, self.rule.needs)))


@dataclass(frozen=True)
class Policy:
    """One version of policy."""

    name: str
    hash: str
    products: Mapping[str, Product]
    rules: tuple[CompiledRule, ...]
    caps: tuple[Rule, ...]
    market: Market
    labels: Mapping[str, str]

    def cap(self, what: str, party: PartyKind, on: dt.date) -> Rule | None:
        """The lowest legal cap in force on a day."""
        found = [c for c in self.caps if c.caps == what and party in c.of and c.valid_from <= on <= c.valid_to]
        return min(found, key=lambda c: c.value, default=None)

    def product_for(self, name: str, party: PartyKind) -> Product | None:
        """The product of that name for that kind of borrower; the first for the kind where no name is given."""
        fitting = [p for p in self.products.values() if p.party == party]
        return next((p for p in fitting if not name or p.name == name), None)


def nested(facts: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """`{"court.x": 1}` as CEL reads it: `{"court": {"x": 1}}`, only the named ones."""
    context: dict[str, dict[str, Any]] = {}
    for name in (*names, "policy.pd_max") if "policy.pd_max" in facts else names:
        room, field = name.split(".", 1)
        context.setdefault(room, {})[field] = facts[name]
    return context


def load_policy(name: str) -> Policy:
    """Read policies/{name}/. Raises PolicyError naming file, rule and fault."""
    folder = resources.files("services.pricing") / "policies" / name
    texts = {}
    for part in ("market", "products", "rules"):
        file = folder / f"{part}.yaml"
        if not file.is_file():
            raise PolicyError(f"policy {name}: {part}.yaml is missing")
        texts[part] = file.read_text(encoding="utf-8")
    return parse_policy(name, texts)


def parse_policy(name: str, texts: Mapping[str, str]) -> Policy:
    """A policy from the texts of market, products and rules. Raises PolicyError."""
    dictionary = yaml.safe_load((resources.files("lending.bureau.v1") / "attributes.yaml").read_text(encoding="utf-8"))
    attributes = dictionary["attributes"]
    try:
        market = Market(**yaml.safe_load(texts["market"]))
        products = {key: Product(name=key, **value) for key, value in yaml.safe_load(texts["products"]).items()}
        rules = [Rule(**rule) for rule in yaml.safe_load(texts["rules"])]
    except (ValidationError, yaml.YAMLError, TypeError) as error:
        raise PolicyError(f"policy {name}: {error}") from error
    for product in products.values():
        if unknown := set(product.sources) - dictionary["sources"].keys():
            raise PolicyError(f"policy {name}: products.yaml: {product.name}: unknown sources {sorted(unknown)}")
    compiled = tuple(_compile(name, rule, attributes) for rule in rules if rule.declines_if)
    digest = hashlib.sha256("\x00".join(texts[part] for part in sorted(texts)).encode()).hexdigest()
    labels = {key: str(a["zh"]) for key, a in attributes.items()}
    return Policy(name, digest, products, compiled, tuple(r for r in rules if r.caps), market, labels)


def _compile(policy: str, rule: Rule, attributes: Mapping[str, Any]) -> CompiledRule:
    where = f"policy {policy}: rules.yaml: {rule.code}"
    if unknown := [n for n in rule.needs if n not in attributes and n not in EXTRA_FACTS]:
        raise PolicyError(f"{where}: unknown attributes {unknown}")
    try:
        compiled = CompiledRule(
            rule, cel.compile(rule.declines_if), cel.compile(rule.nearly_if) if rule.nearly_if else None
        )
    except Exception as error:
        raise PolicyError(f"{where}: {error}") from error
    for example in rule.examples:
        try:
            fired = compiled.fires(example.given)
        except Exception as error:
            raise PolicyError(f"{where}: example {example.given}: {error}") from error
        if fired != example.fires:
            raise PolicyError(f"{where}: example {example.given}: fires is {fired}, expected {example.fires}")
    return compiled
