"""Policy as data: products, rules, caps and market set, read and checked once, with the hash that names them."""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from importlib import resources
from typing import Annotated, Any, Literal, TypeVar

import cel
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from loanmesh.runtime.plain_yaml import WrongYaml, read_yaml

PartyKind = Literal["person", "firm"]
GRADES = frozenset("ABCDE")
_DAYS_KEPT = 100
_RULE_SETS_KEPT = 500
FIGURE_MAX = 2**53
"""Of a condition: what a float still tells from its neighbours."""
_NO_ANSWER = (TypeError, ValueError, ArithmeticError, LookupError, RuntimeError)
"""What a condition that runs can raise."""
CONDITION_CHARS_MAX = 1_000
"""Of a rule. What compiles it is native, calls itself for each operator, and ends the process after some 10,000."""
PARTS = ("market", "products", "rules", "texts")
"""The files of a version."""


class PolicyError(Exception):
    """A policy file cannot be used; the text names file, rule and fault."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Strict):
    """Inclusive bounds."""

    min: int
    max: int

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max:
            raise ValueError("min is above max")
        return self


Share = Annotated[Decimal, Field(ge=0, le=1)]


class Waiver(_Strict):
    """What is left of the limit without a source, and up to which amount asked for one may do without it."""

    limit_share: Share
    amount_up_to_fen: int | None = None


_POSSIBLE = {"amount_fen": (1, 10**13), "term_months": (1, 360), "apr_ppm": (0, 10**6)}
"""What a schedule can be made of: some money, a month to thirty years, a rate that is none or more."""


class Product(_Strict):
    """One product. Money in fen, rates in ppm a year, `pd_max` over `horizon_months`."""

    name: str = ""
    party: PartyKind
    zh: str
    en: str
    amount_fen: Range
    term_months: Range
    apr_ppm: Range
    horizon_months: int
    pd_max: Share
    operating_cost_ppm: int
    margin_ppm: int
    turnover_share: dict[str, Share] = {}
    payment_share: dict[str, Share] = {}
    sources: tuple[str, ...]
    may_do_without: dict[str, Waiver] = {}
    offer_days: int

    @model_validator(mode="after")
    def _possible(self) -> Product:
        for name, (least, most) in _POSSIBLE.items():
            found: Range = getattr(self, name)
            if not least <= found.min <= found.max <= most:
                raise ValueError(f"{name} must lie within {least} and {most}")
        return self

    @property
    def apr_max_ppm(self) -> int:
        """Highest rate."""
        return self.apr_ppm.max

    def waiver(self, source: str, amount_fen: int) -> Waiver | None:
        """What policy grants without that source for an amount asked; None where it cannot do without."""
        found = self.may_do_without.get(source)
        if found and found.amount_up_to_fen is not None and amount_fen > found.amount_up_to_fen:
            return None
        return found


class Market(_Strict):
    """Dated market figures."""

    lpr_1y_ppm: int
    observed_on: dt.date
    funding_spread_ppm: int
    lgd: dict[PartyKind, Share]
    capital_ratio: Share
    risk_weight: dict[PartyKind, Decimal]
    return_on_capital_ppm: int


class Example(_Strict):
    """A case a rule was written for; loading runs it."""

    given: dict[str, bool | int | float | str]
    fires: bool


class NearMiss(_Strict):
    """When a passed rule is told as close: the attribute lies within `margin` (or that share) of the threshold."""

    attribute: str
    threshold: float | str
    """A number, or `policy.pd_max`."""
    margin: float = 0
    margin_share: float = 0


class Rule(_Strict):
    """A rule that declines, or a cap that the law sets."""

    id: str = ""
    code: Annotated[str, Field(pattern="^[A-Z][A-Z0-9_]*$")]
    of: tuple[PartyKind, ...]
    needs: tuple[str, ...] = ()
    declines_if: Annotated[str, Field(max_length=CONDITION_CHARS_MAX)] = ""
    near_miss: NearMiss | None = None
    condition: str = ""
    caps: Literal["", "amount_fen", "term_months", "irr_ppm"] = ""
    value: int = 0
    overrides: str = ""
    """The id of a cap that this one takes the place of while it is in force."""
    valid_from: dt.date = dt.date.min
    valid_to: dt.date = dt.date.max
    temporary: bool = False
    binding: Literal["law", "guidance", "practice", "own"] = "own"
    checked_on: dt.date | None = None
    authority: str = ""
    zh: str
    en: str
    examples: tuple[Example, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        if bool(self.declines_if) == bool(self.caps):
            raise ValueError("a rule has either declines_if or caps")
        if self.caps and self.value <= 0:
            raise ValueError("a cap needs a value above 0")
        return self

    def in_force(self, on: dt.date) -> bool:
        """Whether it applies on a day."""
        return self.valid_from <= on <= self.valid_to


class Text(_Strict):
    """A text in both languages, with `{placeholders}`."""

    zh: str
    en: str


class Attribute(BaseModel):
    """What the dictionary says of one attribute."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    source: str
    type: Literal["integer", "number", "flag", "text"]
    unit: str
    of: tuple[PartyKind, ...]


def _fact(source: str, kind: str, unit: str, *of: str) -> Attribute:
    return Attribute.model_validate({"source": source, "type": kind, "unit": unit, "of": of or ("person", "firm")})


EXTRA_FACTS = {
    "request.purpose_kind": _fact("declared", "text", "code"),
    "request.amount_fen": _fact("declared", "integer", "fen"),
    "request.term_months": _fact("declared", "integer", "months"),
    "request.age_years": _fact("identity", "integer", "years", "person"),
    "request.age_at_end_years": _fact("identity", "integer", "years", "person"),
    "score.pd": _fact("model", "number", "fraction"),
    "policy.pd_max": _fact("policy", "number", "fraction"),
}
"""What rules can read besides the attributes of the dictionary; those of `policy` are always known, never in needs."""

TEXTS = {
    "LIMIT_PRODUCT": {"amount"},
    "LIMIT_TURNOVER": {"amount", "share", "grade"},
    "LIMIT_TURNOVER_UNKNOWN": set[str](),
    "LIMIT_INCOME": {"amount", "share", "grade", "term"},
    "LIMIT_INCOME_UNKNOWN": set[str](),
    "LIMIT_PARTIAL_EVIDENCE": {"amount", "share"},
    "LIMIT_BELOW_MINIMUM": {"amount", "minimum"},
    "TERM_OF_PRODUCT": {"min", "max"},
    "EVIDENCE_MISSING": {"source"},
    "WITHOUT_SOURCE": {"source", "share"},
    "NEAR_MISS": {"text"},
    "SOURCE_DECLARED": set[str](),
    "SOURCE_IDENTITY": set[str](),
}
"""The texts that texts.yaml must have, and what each may name."""

_PLACEHOLDER = re.compile(r"\{([a-z0-9_.]+)\}")


# Quoted text is passed over, and so is what is called: that is a method.
_FACT = re.compile(r""""[^"]*"|'[^']*'|\b(?P<name>[a-z_]+\.[a-z_][a-z0-9_]*)\b(?!\s*\()""")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its placeholders filled in; one without a value reads as a dash."""
    text, names = _prepared(template)
    return text % tuple([values.get(name, "—") for name in names])


@lru_cache(maxsize=1000)
def _prepared(template: str) -> tuple[str, Sequence[str]]:
    """The text with `%s` for each placeholder, and their names."""
    parts = _PLACEHOLDER.split(template)
    return "%s".join(text.replace("%", "%%") for text in parts[::2]), parts[1::2]


@dataclass(frozen=True)
class CompiledRule:
    """A rule with its condition ready to run."""

    rule: Rule
    program: Any

    def fires(self, values: Mapping[str, Any]) -> bool:
        """Whether it declines on these facts. RuntimeError when one that it needs is absent."""
        return bool(self.program.execute({flat(name): value for name, value in values.items()}))

    def nearly_fires(self, values: Mapping[str, Any]) -> bool:
        """Whether it passed, but closer than the policy's margin."""
        near = self.rule.near_miss
        if near is None:
            return False
        at = float(values[near.threshold]) if isinstance(near.threshold, str) else near.threshold
        return abs(float(values[near.attribute]) - at) <= max(near.margin, abs(at) * near.margin_share)


@dataclass(frozen=True)
class RuleSet:
    """Rules as one program: most of a rule's cost is in starting it."""

    rules: tuple[CompiledRule, ...]
    needs: tuple[str, ...]
    """What they need, in their order."""
    unknown: tuple[str, ...]
    """What was not known, which left rules out, in the order of those."""
    reads: tuple[tuple[str, str], ...]
    """What the program reads: its own name for it, and ours."""
    program: Any

    def fired(self, values: Mapping[str, Any]) -> list[bool]:
        """Which of the rules decline, in order; `values` hold all that they read."""
        return list(self.program.execute({own: values[name] for own, name in self.reads}))


@dataclass(frozen=True)
class Policy:
    """One version of policy."""

    name: str
    hash: str
    products: Mapping[str, Product]
    rules: tuple[CompiledRule, ...]
    caps: tuple[Rule, ...]
    market: Market
    dictionary: Mapping[str, Attribute]
    texts: Mapping[str, Text]
    sources: Mapping[str, Text]
    """What the sources are called."""
    types: Mapping[str, Mapping[str, str]]
    """By source: the facts it may state, each with its kind of value."""
    _caps_found: dict[tuple[str, PartyKind, dt.date], Rule | None] = field(default_factory=dict, compare=False)
    _rule_sets: dict[tuple[PartyKind, dt.date, tuple[str, ...]], RuleSet] = field(default_factory=dict, compare=False)

    def cap(self, what: str, party: PartyKind, on: dt.date) -> Rule | None:
        """The lowest legal cap in force on a day, without those that another one in force overrides."""
        key = (what, party, on)
        if key not in self._caps_found:
            if len(self._caps_found) > _DAYS_KEPT:
                self._caps_found.clear()
            self._caps_found[key] = self._find_cap(what, party, on)
        return self._caps_found[key]

    def rules_on(self, facts: Collection[str], party: PartyKind, on: dt.date) -> RuleSet:
        """The rules in force for that kind of borrower that facts of these names can answer."""
        every = self._rule_set(party, on, ())
        absent = tuple([name for name in every.needs if name not in facts])
        return self._rule_set(party, on, absent) if absent else every

    def _rule_set(self, party: PartyKind, on: dt.date, absent: tuple[str, ...]) -> RuleSet:
        key = (party, on, absent)
        if key not in self._rule_sets:
            # As many as there are days and sets of facts that sources left out; a new one costs a compilation.
            if len(self._rule_sets) > _RULE_SETS_KEPT:
                self._rule_sets.clear()
            in_force = [c for c in self.rules if party in c.rule.of and c.rule.in_force(on)]
            self._rule_sets[key] = _together([c for c in in_force if not set(absent) & set(c.rule.needs)], absent)
        return self._rule_sets[key]

    def _find_cap(self, what: str, party: PartyKind, on: dt.date) -> Rule | None:
        found = [c for c in self.caps if c.caps == what and party in c.of and c.in_force(on)]
        overridden = {c.overrides for c in found if c.overrides}
        return min((c for c in found if c.id not in overridden), key=lambda c: c.value, default=None)

    def product_for(self, name: str, party: PartyKind) -> Product | None:
        """The product of that name for that kind of borrower; the first for the kind where no name is given."""
        fitting = [p for p in self.products.values() if p.party == party]
        return next((p for p in fitting if not name or p.name == name), None)


def flat(name: str) -> str:
    """What a compiled condition calls a fact. A tree of rooms and facts costs three times as much to hand over."""
    return name.replace(".", "__")


def _compiled(condition: str) -> Any:
    """CEL, with the names of facts outside of quotes made flat. Raises ValueError."""
    return cel.compile(_FACT.sub(lambda found: flat(found[0]) if found["name"] else found[0], condition))


def _together(rules: Sequence[CompiledRule], unknown: tuple[str, ...]) -> RuleSet:
    reads = dict.fromkeys(name for c in rules for name in sorted(_names(c.rule.declines_if)))
    return RuleSet(
        rules=tuple(rules),
        needs=tuple(dict.fromkeys(name for c in rules for name in c.rule.needs)),
        unknown=unknown,
        reads=tuple((flat(name), name) for name in reads),
        program=_compiled("[" + ", ".join(f"({c.rule.declines_if})" for c in rules) + "]"),
    )


def load_policy(name: str) -> Policy:
    """Read policies/{name}/. Raises PolicyError naming file, rule and fault."""
    folder = resources.files("services.pricing") / "policies" / name
    texts = {}
    for part in PARTS:
        file = folder / f"{part}.yaml"
        if not file.is_file():
            raise PolicyError(f"policy {name}: {part}.yaml is missing")
        texts[part] = file.read_text(encoding="utf-8")
    return parse_policy(name, texts)


def parse_policy(name: str, files: Mapping[str, str]) -> Policy:
    """A policy from the texts of its files. Raises PolicyError naming file, rule and fault."""
    dictionary = yaml.safe_load((resources.files("lending.bureau.v1") / "attributes.yaml").read_text(encoding="utf-8"))
    attributes = {key: Attribute.model_validate(value) for key, value in dictionary["attributes"].items()}
    read = {part: _yaml(name, part, files.get(part, "")) for part in PARTS}
    where = f"policy {name}: "
    market = _checked(Market, _mapping(read["market"], f"{where}market.yaml"), f"{where}market.yaml")
    products = {}
    for key, value in _mapping(read["products"], f"{where}products.yaml").items():
        at = f"{where}products.yaml: {key}"
        products[key] = _checked(Product, {**_mapping(value, at), "name": key}, at)
        _check_product(products[key], dictionary["sources"], at)
    if not isinstance(read["rules"], list):
        raise PolicyError(f"{where}rules.yaml: is no list of rules")
    rules = []
    for value in read["rules"]:
        at = f"{where}rules.yaml: {value.get('id') or value.get('code') if isinstance(value, dict) else value}"
        rules.append(_checked(Rule, _mapping(value, at), at))
    compiled = tuple(_compile(rule, attributes, f"{where}rules.yaml: {rule.code}") for rule in rules if not rule.caps)
    _check_ids(rules, f"{where}rules.yaml")
    said = {
        key: _checked(Text, _mapping(value, f"{where}texts.yaml: {key}"), f"{where}texts.yaml: {key}")
        for key, value in _mapping(read["texts"], f"{where}texts.yaml").items()
    }
    _check_texts(said, f"{where}texts.yaml")
    digest = hashlib.sha256("\x00".join(files[part] for part in PARTS).encode()).hexdigest()
    sources = {key: Text(**value) for key, value in dictionary["sources"].items()}
    sources |= {"declared": said["SOURCE_DECLARED"], "identity": said["SOURCE_IDENTITY"]}
    return Policy(
        name=name,
        hash=digest,
        products=products,
        rules=compiled,
        caps=tuple(rule for rule in rules if rule.caps),
        market=market,
        dictionary={**attributes, **EXTRA_FACTS},
        texts=said,
        sources=sources,
        types={
            source: {key: a.type for key, a in attributes.items() if a.source == source}
            for source in dictionary["sources"]
        },
    )


M = TypeVar("M", bound=BaseModel)


def _yaml(policy: str, part: str, text: str) -> Any:
    try:
        return read_yaml(text)
    except WrongYaml as error:
        raise PolicyError(f"policy {policy}: {part}.yaml{error.place}: {error}") from error


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise PolicyError(f"{where}: is no mapping")
    return value


def _checked(model: type[M], value: dict[str, Any], where: str) -> M:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise PolicyError(f"{where}: {faults}") from error


def _check_product(product: Product, sources: Mapping[str, Any], where: str) -> None:
    if unknown := set(product.sources) - sources.keys():
        raise PolicyError(f"{where}: unknown sources {sorted(unknown)}")
    if unknown := product.may_do_without.keys() - set(product.sources):
        raise PolicyError(f"{where}: may_do_without names {sorted(unknown)}, which it is not founded on")
    for shares in (product.turnover_share, product.payment_share):
        if shares and shares.keys() != GRADES:
            raise PolicyError(f"{where}: shares must name each of the grades {sorted(GRADES)}")


def _check_ids(rules: Iterable[Rule], where: str) -> None:
    seen: set[str] = set()
    for rule in rules:
        if (key := rule.id or rule.code) in seen:
            raise PolicyError(f"{where}: {key} stands there twice")
        seen.add(key)
    for rule in rules:
        if rule.overrides and rule.overrides not in seen:
            raise PolicyError(f"{where}: {rule.id or rule.code}: overrides {rule.overrides}, which does not exist")


def _check_texts(texts: Mapping[str, Text], where: str) -> None:
    if missing := TEXTS.keys() - texts.keys():
        raise PolicyError(f"{where}: texts are missing for {sorted(missing)}")
    for code, text in texts.items():
        if code not in TEXTS:
            raise PolicyError(f"{where}: {code} is no code that pricing tells")
        if unknown := set(_PLACEHOLDER.findall(text.zh + text.en)) - TEXTS[code]:
            raise PolicyError(f"{where}: {code}: unknown placeholders {sorted(unknown)}")


def _compile(rule: Rule, attributes: Mapping[str, Attribute], where: str) -> CompiledRule:
    """The rule, compiled; refused where names, types, texts or examples do not fit."""
    known = {**attributes, **EXTRA_FACTS}
    if unknown := [n for n in rule.needs if n not in known]:
        raise PolicyError(f"{where}: unknown attributes {unknown}")
    for need in rule.needs:
        if missing := set(rule.of) - set(known[need].of):
            raise PolicyError(f"{where}: {need} is not stated of a {sorted(missing)[0]}")
    try:
        compiled = CompiledRule(rule, _compiled(rule.declines_if))
    except ValueError as error:
        raise PolicyError(f"{where}: {error}") from error
    reads = _names(rule.declines_if)
    if unknown := sorted(name for name in reads if name not in known):
        raise PolicyError(f"{where}: declines_if reads unknown attributes {unknown}")
    if (asked := {name for name in reads if not name.startswith("policy.")}) != set(rule.needs):
        raise PolicyError(f"{where}: needs says {sorted(rule.needs)}, declines_if reads {sorted(asked)}")
    if unknown := sorted(set(_PLACEHOLDER.findall(rule.zh + rule.en + rule.condition)) - reads):
        raise PolicyError(f"{where}: texts name {unknown}, which the rule does not read")
    if near := rule.near_miss:
        for end in (near.attribute, near.threshold):
            if isinstance(end, str) and (end not in reads or known[end].type not in ("integer", "number")):
                raise PolicyError(f"{where}: near_miss: {end} is no number that the rule reads")
    _probe(compiled, {name: known[name].type for name in sorted(reads)}, where)
    for example in rule.examples:
        if set(example.given) != reads:
            raise PolicyError(f"{where}: example {example.given}: must give {sorted(reads)}")
        try:
            fired = compiled.fires(example.given)
        except _NO_ANSWER as error:
            raise PolicyError(f"{where}: example {example.given}: cannot be: {str(error)[:200]}") from error
        if fired != example.fires:
            raise PolicyError(f"{where}: example {example.given}: fires is {fired}, expected {example.fires}")
    return compiled


def _names(condition: str) -> set[str]:
    return {found["name"] for found in _FACT.finditer(condition) if found["name"]}


def _probe(compiled: CompiledRule, types: Mapping[str, str], where: str) -> None:
    """Check types: CEL here has no static checker, so the condition must answer yes or no for values of every type it
    declares, on both sides of every figure it names."""
    expression = compiled.rule.declines_if
    words = [a or b for a, b in re.findall(r'"([^"]*)"|\'([^\']*)\'', expression)]
    figures = [float(n) for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", expression)]
    if large := [figure for figure in figures if figure > FIGURE_MAX]:
        raise PolicyError(f"{where}: declines_if names a figure above {FIGURE_MAX:,}: {large[0]:g}")
    samples: dict[str, list[Any]] = {
        "flag": [False, True],
        "text": ["", *words],
        "integer": sorted({0, 1, *(int(f) + d for f in figures for d in (-1, 0, 1))}),
        "number": sorted({0.0, 1.0, *figures, *(f + d for f in figures for d in (-0.5, 0.5))}),
    }
    for given in itertools.islice(itertools.product(*(samples[kind] for kind in types.values())), 2_000):
        values = dict(zip(types, given, strict=True))
        try:
            answer = compiled.program.execute({flat(name): value for name, value in values.items()})
        except _NO_ANSWER as error:
            raise PolicyError(f"{where}: declines_if has no answer for {values}: {error}") from error
        if not isinstance(answer, bool):
            raise PolicyError(f"{where}: declines_if answers {answer!r} for {values}, not yes or no")
