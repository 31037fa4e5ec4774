"""The decision under policy: rules, limit, rate, offers, outcome. Pure; the same inputs give the same answer.

Never declines on partial evidence: a would-be decline while a source that the product is founded on is silent or has
only an old answer is *undetermined*, and the mesh waits for the source.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest, Pricing
from lending.type.v1.party_pb2 import Party
from lending.type.v1.reason_pb2 import Reason

from loanmesh.runtime.errors import InvalidRequest
from services.pricing.evidence import Evidence, age_at_end, evidence, stamp, today
from services.pricing.offer import make_offers
from services.pricing.policy import GRADES, CompiledRule, PartyKind, Policy, Product, Range, RuleSet
from services.pricing.rate import nominal_most_ppm
from services.pricing.reason import limit_reasons, missing_reason, rule_reason, term_reason, waived_reason

__all__ = ["nominal_most_ppm", "price"]

_END = "request.age_at_end_years"
"""The one fact that depends on the term."""


def price(item: PriceApplicationsRequest.Item, policy: Policy, now: dt.datetime) -> Pricing:
    """What policy says of one application.

    Raises InvalidRequest for a product that does not exist or fit, and for a score that is none.
    """
    party: PartyKind = "person" if item.party_kind == Party.KIND_PERSON else "firm"
    product = _product(item, policy, party)
    day = today(now)
    terms = _terms(policy, product, day)
    nearest = min(max(item.loan.term_months, terms.min), terms.max)
    known = evidence(item, policy.types, now, nearest)
    rules = policy.rules_on(known.values, party, day)
    about_end = [c for c in rules.rules if _END in c.rule.needs]

    ended: dict[int, list[CompiledRule]] = {}

    def ended_by(months: int) -> list[CompiledRule]:
        if not about_end:
            return []
        age_years = age_at_end(item.age_years, months)
        if age_years not in ended:
            values = {**known.values, _END: age_years}
            ended[age_years] = [c for c in about_end if c.fires({name: values[name] for name in c.rule.needs})]
        return ended[age_years]

    # Who would be too old at the end of this term is offered the longest term that ends in time, where there is one.
    shorter = (months for months in range(nearest, terms.min - 1, -1) if not ended_by(months))
    term = next(shorter, nearest)
    limits = []
    if nearest != item.loan.term_months:
        limits.append(term_reason(product, terms.min, terms.max, policy, known))
    if term != nearest:
        limits += [rule_reason(c, Reason.EFFECT_REDUCE, known, policy, product) for c in ended_by(nearest)]
        known = evidence(item, policy.types, now, term)
    judged = _judge(policy, product, known, rules, told={reason.code for reason in limits})
    result = Pricing(policy=policy.name, policy_hash=policy.hash, price_time=stamp(now))
    if judged.fired:
        return _declined(result, policy, product, known, [*judged.fired, *judged.near])

    silent = set(product.sources) - known.usable
    waivers = {s: w for s in sorted(silent) if (w := product.waiver(s, item.loan.amount_fen))}
    # A source that policy cannot do without, or a rule that nobody's facts answer, leaves the outcome open.
    if blocking := (silent | judged.unknown.keys()) - waivers.keys():
        return _undetermined(result, policy, blocking, judged.near)

    share = min((w.limit_share for w in waivers.values()), default=None)
    offers, found = make_offers(
        item, policy, product, known, share, term, terms, lambda months: not ended_by(months), now, day
    )
    limits = [*limit_reasons(found, item.loan.amount_fen, policy, product, known, bool(offers)), *limits]
    if not offers:
        return _declined(result, policy, product, known, [*limits, *judged.near])
    result.offers.extend(offers)
    as_asked = offers[0].principal_fen == item.loan.amount_fen and offers[0].term_months == item.loan.term_months
    result.outcome = Pricing.OUTCOME_APPROVED if as_asked else Pricing.OUTCOME_COUNTER_OFFER
    told = sorted([*limits, *judged.near], key=lambda reason: reason.effect == Reason.EFFECT_NEAR_MISS)
    result.reasons.extend(told)
    for source, waiver in waivers.items():
        unjudged = judged.unknown.get(source, ())
        result.reasons.append(waived_reason(source, unjudged, f"{waiver.limit_share:.0%}", policy))
        result.missing_sources.append(source)
        result.degradations.append(f"without_{source}")
    # What bureau left out under load is part of how it was decided.
    result.degradations.extend(f"{r.degradation}:{r.source}" for r in item.profile.reports if r.degradation)
    return result


def _product(item: PriceApplicationsRequest.Item, policy: Policy, party: PartyKind) -> Product:
    product = policy.product_for(item.loan.product, party)
    if product is None:
        fitting = ", ".join(p.name for p in policy.products.values() if p.party == party)
        raise InvalidRequest(("loan.product", f"is no product for a {party}; products are: {fitting}"))
    # No comparison is ever true of NaN, so every rule about the risk would let it pass.
    if not (math.isfinite(item.score.pd) and 0 < item.score.pd < 1):
        raise InvalidRequest(("score.pd", "must be a probability above 0 and below 1"))
    if item.score.grade not in GRADES:
        raise InvalidRequest(("score.grade", f"must be one of {', '.join(sorted(GRADES))}"))
    return product


def _terms(policy: Policy, product: Product, day: dt.date) -> Range:
    """The terms on offer, months: the product's, within the law's."""
    cap, offered = policy.cap("term_months", product.party, day), product.term_months
    if cap is None or cap.value >= offered.max:
        return offered
    return Range(min=min(offered.min, cap.value), max=cap.value)


@dataclass(frozen=True)
class _Judgement:
    fired: Sequence[Reason]
    near: Sequence[Reason]
    unknown: Mapping[str, Sequence[str]]
    """The facts that rules lacked, by the source that was silent about them."""


def _judge(policy: Policy, product: Product, known: Evidence, rules: RuleSet, told: Collection[str]) -> _Judgement:
    """All rules, not only the first that fires; no near miss under a code that is told already."""
    fired, near = [], []
    values = {**known.values, "policy.pd_max": float(product.pd_max)}
    for compiled, fires in zip(rules.rules, rules.fired(values), strict=True):
        if fires:
            fired.append(rule_reason(compiled, Reason.EFFECT_DECLINE, known, policy, product))
        elif compiled.rule.near_miss and compiled.rule.code not in told and compiled.nearly_fires(values):
            near.append(rule_reason(compiled, Reason.EFFECT_NEAR_MISS, known, policy, product))
    unknown: dict[str, list[str]] = {}
    for name in rules.unknown:
        source = policy.dictionary[name].source
        # A source that answered without this fact holds nothing against the applicant (a thin file).
        if source not in known.usable:
            unknown.setdefault(source, []).append(name)
    return _Judgement(fired, near, unknown)


def _declined(result: Pricing, policy: Policy, product: Product, known: Evidence, reasons: Sequence[Reason]) -> Pricing:
    """The one place that declines, and only on an answer in date from every source of the product."""
    if incomplete := set(product.sources) - known.complete:
        near = [reason for reason in reasons if reason.effect == Reason.EFFECT_NEAR_MISS]
        return _undetermined(result, policy, incomplete, near)
    result.outcome = Pricing.OUTCOME_DECLINED
    result.reasons.extend(reasons)
    return result


def _undetermined(result: Pricing, policy: Policy, sources: Iterable[str], near: Sequence[Reason]) -> Pricing:
    result.outcome = Pricing.OUTCOME_UNDETERMINED
    result.missing_sources.extend(sorted(sources))
    result.reasons.extend(missing_reason(source, policy) for source in result.missing_sources)
    result.reasons.extend(near)
    return result
