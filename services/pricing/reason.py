"""Reasons in words: what a rule, a bound or a gap in the evidence did, with its facts, in Chinese and English."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from lending.type.v1.reason_pb2 import Fact, Reason, Value

from services.pricing.evidence import Evidence
from services.pricing.limit import Bound
from services.pricing.policy import CompiledRule, Policy, Product, Text, fill

NEAR_BOUND = 1.25
"""A bound within a quarter above what was asked is told as a near miss."""
Effect: TypeAlias = "Reason.Effect.ValueType"


def rule_reason(compiled: CompiledRule, effect: Effect, known: Evidence, policy: Policy, product: Product) -> Reason:
    """What one rule did."""
    rule = compiled.rule
    values = {name: _worded(known.values[name], policy.dictionary[name].unit) for name in rule.needs}
    values["policy.pd_max"] = f"{product.pd_max:.1%}"
    condition = fill(rule.condition, {"policy.pd_max": str(product.pd_max)})
    facts = [known.fact(name, condition) for name in rule.needs]
    reason = Reason(code=rule.code, kind=Reason.KIND_RULE, effect=effect, facts=facts, authority=rule.authority)
    _tell(reason, fill(rule.zh, values), fill(rule.en, values), policy)
    return reason


def limit_reasons(found: Sequence[Bound], asked_fen: int, policy: Policy, product: Product, known: Evidence,
                  offered: bool) -> list[Reason]:  # fmt: skip
    """The bounds that bound, lowest first; those that nearly did; and the decline when no amount is left to offer."""
    least = product.amount_fen.min
    reasons = []
    if not offered:
        most = min(asked_fen, found[0].amount_fen)
        values = {"amount": _worded(most, "fen"), "minimum": _worded(least, "fen")}
        facts = [known.fact("request.amount_fen", f">= {least}"), _setting("policy.amount_fen_min", least)]
        facts += [known.fact(name) for name in (found[0].facts if found[0].amount_fen < least else ())]
        reasons.append(_limit("LIMIT_BELOW_MINIMUM", Reason.EFFECT_DECLINE, facts, values, policy))
    for bound in found:
        if not offered and bound.amount_fen < min(asked_fen, least):
            effect: Effect = Reason.EFFECT_DECLINE
        elif bound.amount_fen < asked_fen:
            effect = Reason.EFFECT_REDUCE
        elif offered and bound.amount_fen < asked_fen * NEAR_BOUND:
            effect = Reason.EFFECT_NEAR_MISS
        else:
            continue
        reasons.append(_bound(bound, effect, policy, known))
    return reasons


def term_reason(product: Product, least: int, most: int, policy: Policy, known: Evidence) -> Reason:
    """That the term asked for is not one of the product's."""
    values = {"min": str(least), "max": str(most)}
    asked = known.fact("request.term_months", f">= {least}, <= {most}")
    settings = [_setting("policy.term_months_min", least), _setting("policy.term_months_max", most)]
    return _limit("TERM_OF_PRODUCT", Reason.EFFECT_REDUCE, [asked, *settings], values, policy)


def missing_reason(source: str, policy: Policy) -> Reason:
    """That the outcome waits for a source."""
    return _evidence("EVIDENCE_MISSING", "EVIDENCE_MISSING", Reason.EFFECT_DEFER, source, (), {}, policy)


def waived_reason(source: str, unjudged: Sequence[str], share: str, policy: Policy) -> Reason:
    """That policy did without a source; its facts name what could not be judged."""
    code = f"WITHOUT_{source.upper()}"
    return _evidence(code, "WITHOUT_SOURCE", Reason.EFFECT_WAIVED, source, unjudged, {"share": share}, policy)


def _bound(bound: Bound, effect: Effect, policy: Policy, known: Evidence) -> Reason:
    """What was asked against the bound, then what the bound was computed from: facts of sources, figures of policy."""
    values = {**bound.says, "amount": _worded(bound.amount_fen, "fen")}
    facts = [known.fact("request.amount_fen", f"<= {bound.amount_fen}"), *(known.fact(name) for name in bound.facts)]
    facts += [_setting(name, value) for name, value in bound.settings.items()]
    if bound.rule is None:
        return _limit(bound.code, effect, facts, values, policy)
    reason = Reason(code=bound.code, kind=Reason.KIND_LIMIT, effect=effect, facts=facts, authority=bound.rule.authority)
    amount = values["amount"]
    _tell(reason, f"{bound.rule.zh}为{amount}元", f"{bound.rule.en}: {amount} CNY", policy)
    return reason


def _limit(code: str, effect: Effect, facts: Sequence[Fact], values: Mapping[str, str], policy: Policy) -> Reason:
    text = policy.texts[code]
    reason = Reason(code=code, kind=Reason.KIND_LIMIT, effect=effect, facts=facts)
    _tell(reason, fill(text.zh, values), fill(text.en, values), policy)
    return reason


def _tell(reason: Reason, zh: str, en: str, policy: Policy) -> None:
    """Give a reason its texts; one that was kept narrowly says so."""
    if reason.effect == Reason.EFFECT_NEAR_MISS:
        near = policy.texts["NEAR_MISS"]
        zh, en = fill(near.zh, {"text": zh}), fill(near.en, {"text": en})
    reason.text_zh, reason.text_en = zh, en


def _setting(name: str, value: int | float) -> Fact:
    """A figure of policy as a fact."""
    stated = Value(integer=value) if isinstance(value, int) else Value(number=value)
    return Fact(attribute=name, value=stated, source="policy")


def _evidence(code: str, key: str, effect: Effect, source: str, unjudged: Sequence[str], values: Mapping[str, str],
              policy: Policy) -> Reason:  # fmt: skip
    text, name = policy.texts[key], policy.sources.get(source, Text(zh=source, en=source))
    return Reason(
        code=code,
        kind=Reason.KIND_EVIDENCE,
        effect=effect,
        facts=[Fact(attribute=fact, source=source) for fact in unjudged or (source,)],
        text_zh=fill(text.zh, {**values, "source": name.zh}),
        text_en=fill(text.en, {**values, "source": name.en}),
    )


def _worded(value: object, unit: str) -> str:
    if isinstance(value, int) and unit == "fen":
        return f"{value // 100:,}" if value % 100 == 0 else f"{value / 100:,.2f}"
    if isinstance(value, float):
        return f"{value:.1%}" if unit == "fraction" else f"{value:.2f}"
    return str(value)
