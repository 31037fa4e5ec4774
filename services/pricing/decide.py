"""The decision under policy: rules, limit, rate, offers, outcome. Pure; the same inputs give the same answer.

Never declines on partial evidence: a would-be decline while a source that the product is founded on is silent or has
only an old answer is *undetermined*, and the mesh waits for the source.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence

from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest, Pricing
from lending.type.v1.offer_pb2 import Offer, RateComponent
from lending.type.v1.party_pb2 import Party
from lending.type.v1.reason_pb2 import Fact, Reason

from loanmesh.runtime.errors import InvalidRequest
from services.pricing.evidence import Evidence, evidence, today
from services.pricing.limit import STEP_FEN, Bound, bounds
from services.pricing.policy import CompiledRule, PartyKind, Policy, Product
from services.pricing.rate import Rate, build_rate
from services.pricing.schedule import effective_ppm, level_payment_fen, schedule

NEAR_BOUND = 1.25
"""A bound within a quarter above the binding one is told as a near miss."""


def price(item: PriceApplicationsRequest.Item, policy: Policy, now: dt.datetime) -> Pricing:
    """What policy says of one application. Raises InvalidRequest for a product that does not exist or fit."""
    party: PartyKind = "person" if item.party_kind == Party.KIND_PERSON else "firm"
    product = policy.product_for(item.loan.product, party)
    if product is None:
        fitting = ", ".join(p.name for p in policy.products.values() if p.party == party)
        raise InvalidRequest(("loan.product", f"is no product for a {party}; products are: {fitting}"))
    known = evidence(item)
    fired, near, unknown_sources = _apply_rules(policy, product, party, known)
    missing = sorted(set(product.sources) - known.usable)
    waived = [source for source in missing if source in product.may_do_without]
    # A source that nobody may do without, or a fact no source stated, leaves the outcome open, never declined.
    blocking = sorted((set(missing) - set(waived)) | (unknown_sources - set(waived)))
    result = Pricing(policy=policy.name, policy_hash=policy.hash)
    result.price_time.FromDatetime(now)
    if blocking and not fired:
        return _undetermined(result, blocking, near)
    if fired:
        return _declined(result, product, known, [*fired, *near])
    offers, limits = _offers(item, policy, product, known, waived, now)
    if not offers:
        return _declined(result, product, known, [*limits, *near])
    result.offers.extend(offers)
    as_asked = offers[0].principal_fen == item.loan.amount_fen and offers[0].term_months == item.loan.term_months
    result.outcome = Pricing.OUTCOME_APPROVED if as_asked else Pricing.OUTCOME_COUNTER_OFFER
    result.reasons.extend([*limits, *near, *(_waived(source) for source in waived)])
    result.missing_sources.extend(waived)
    result.degradations.extend(f"without_{source}" for source in waived)
    return result


def _apply_rules(
    policy: Policy, product: Product, party: PartyKind, known: Evidence
) -> tuple[list[Reason], list[Reason], set[str]]:
    """All rules, not only the first that fires: (fired, nearly fired, sources whose silence left a rule unknown)."""
    fired, near, silent = [], [], set()
    values = {**known.values, "policy.pd_max": float(product.pd_max)}
    for compiled in policy.rules:
        rule = compiled.rule
        if party not in rule.of:
            continue
        absent = [name for name in rule.needs if name not in values]
        if absent:
            # Answered, but without this fact: there is nothing to hold against the applicant (a thin file).
            silent |= {_source(name) for name in absent} & (set(product.sources) - known.usable)
        elif compiled.fires(values):
            fired.append(_reason(compiled, Reason.EFFECT_DECLINE, known))
        elif compiled.nearly_fires(values):
            near.append(_reason(compiled, Reason.EFFECT_NEAR_MISS, known))
    return fired, near, silent


def _source(attribute: str) -> str:
    return {"credit": "central_bank", "bank": "bank_flow"}.get(room := attribute.split(".", 1)[0], room)


def _declined(result: Pricing, product: Product, known: Evidence, reasons: Sequence[Reason]) -> Pricing:
    if incomplete := sorted(set(product.sources) - known.complete):
        return _undetermined(result, incomplete, [r for r in reasons if r.effect == Reason.EFFECT_NEAR_MISS])
    result.outcome = Pricing.OUTCOME_DECLINED
    result.reasons.extend(reasons)
    return result


def _undetermined(result: Pricing, sources: Sequence[str], reasons: Sequence[Reason]) -> Pricing:
    result.outcome = Pricing.OUTCOME_UNDETERMINED
    result.missing_sources.extend(sources)
    for source in sources:
        result.reasons.append(
            Reason(
                code="EVIDENCE_MISSING",
                kind=Reason.KIND_EVIDENCE,
                effect=Reason.EFFECT_DEFER,
                facts=[Fact(attribute=source, source=source)],
                text_zh=f"等待{source}的数据",
                text_en=f"waiting for {source}",
            )
        )
    result.reasons.extend(reasons)
    return result


def _offers(
    item: PriceApplicationsRequest.Item,
    policy: Policy,
    product: Product,
    known: Evidence,
    waived: Sequence[str],
    now: dt.datetime,
) -> tuple[list[Offer], list[Reason]]:
    """Offers, best first, and what bound them; no offer when the limit is below the product's least amount."""
    day = today(now)
    cap_term, cap_all_in = (policy.cap(what, product.party, day) for what in ("term_months", "irr_ppm"))
    term_most = min(product.term_months.max, cap_term.value if cap_term else product.term_months.max)
    term = min(max(item.loan.term_months, product.term_months.min), term_most)
    apr_most = nominal_most_ppm(cap_all_in.value) if cap_all_in else product.apr_max_ppm
    rate = build_rate(item.score.pd, product, policy.market, apr_most)
    reasons: list[Reason] = []
    offers: list[Offer] = []
    cap = policy.cap("amount_fen", product.party, day)
    terms = [term] if product.party == "firm" or term == term_most else [term, term_most]
    for months in terms:
        found = bounds(product, item.score.grade, months, rate.apr_ppm, known, cap)
        haircut = min((product.may_do_without[source] for source in waived), default=None)
        most = found[0].amount_fen if haircut is None else int(found[0].amount_fen * haircut) // STEP_FEN * STEP_FEN
        amount = min(item.loan.amount_fen, most)
        if months == term:
            reasons = _limit_reasons(item, found, most, known, months, product)
        if amount >= product.amount_fen.min and (not offers or amount > offers[0].principal_fen):
            offers.append(_offer(f"offer-{len(offers) + 1}", product, amount, months, rate, now))
        if offers and offers[0].principal_fen == item.loan.amount_fen:
            break
    if not offers:
        for reason in reasons:
            reason.effect = Reason.EFFECT_DECLINE
    return offers, reasons


def nominal_most_ppm(effective_ppm: int) -> int:
    """Highest nominal yearly rate, ppm, whose monthly compounding stays within an effective one (the stricter test)."""
    return int(12 * ((1 + effective_ppm / 1e6) ** (1 / 12) - 1) * 1e6)


def _limit_reasons(
    item: PriceApplicationsRequest.Item,
    found: Sequence[Bound],
    most_fen: int,
    known: Evidence,
    months: int,
    product: Product,
) -> list[Reason]:
    reasons = []
    asked = item.loan.amount_fen
    if most_fen < asked or asked < product.amount_fen.min:
        reasons.append(_bound_reason(found[0], Reason.EFFECT_REDUCE, known, most_fen))
    for bound in found[1:]:
        if bound.amount_fen < asked:
            reasons.append(_bound_reason(bound, Reason.EFFECT_REDUCE, known, bound.amount_fen))
    if not reasons and found[0].amount_fen < asked * NEAR_BOUND:
        reasons.append(_bound_reason(found[0], Reason.EFFECT_NEAR_MISS, known, found[0].amount_fen))
    if asked < product.amount_fen.min:
        least = Bound(
            "LIMIT_PRODUCT_LEAST",
            product.amount_fen.min,
            ("request.amount_fen",),
            "产品最低额度",
            "the product's least amount",
        )
        reasons.insert(0, _bound_reason(least, Reason.EFFECT_REDUCE, known, product.amount_fen.min))
    if months != item.loan.term_months:
        reasons.append(
            Reason(
                code="TERM_OF_PRODUCT",
                kind=Reason.KIND_LIMIT,
                effect=Reason.EFFECT_REDUCE,
                facts=[known.facts["request.term_months"]],
                text_zh=f"本产品期限为{product.term_months.min}至{product.term_months.max}个月",
                text_en=f"the product runs {product.term_months.min} to {product.term_months.max} months",
            )
        )
    return reasons


def _bound_reason(bound: Bound, effect: Reason.Effect.ValueType, known: Evidence, amount_fen: int) -> Reason:
    return Reason(
        code=bound.code,
        kind=Reason.KIND_LIMIT,
        effect=effect,
        facts=[known.facts[name] for name in bound.facts if name in known.facts],
        text_zh=f"{bound.zh}：{amount_fen / 100:,.0f}元",
        text_en=f"{bound.en}: {amount_fen / 100:,.0f} CNY",
        authority=bound.authority,
    )


def _offer(offer_id: str, product: Product, amount_fen: int, months: int, rate: Rate, now: dt.datetime) -> Offer:
    payments = [row.payment_fen for row in schedule(amount_fen, rate.apr_ppm, months)]
    offer = Offer(
        offer_id=offer_id,
        product=product.name,
        principal_fen=amount_fen,
        term_months=months,
        apr_ppm=rate.apr_ppm,
        irr_ppm=effective_ppm(amount_fen, payments),
        instalment_fen=level_payment_fen(amount_fen, rate.apr_ppm, months),
        last_instalment_fen=payments[-1],
        total_interest_fen=sum(payments) - amount_fen,
        rate_components=[
            RateComponent(component=line.name, rate_ppm=line.rate_ppm, basis=line.basis) for line in rate.components
        ],
    )
    offer.expire_time.FromDatetime(now + dt.timedelta(days=product.offer_days))
    return offer


def _reason(compiled: CompiledRule, effect: Reason.Effect.ValueType, known: Evidence) -> Reason:
    rule = compiled.rule
    facts = []
    for name in rule.needs:
        fact = Fact()
        fact.CopyFrom(known.facts[name])
        fact.condition = rule.condition
        facts.append(fact)
    return Reason(
        code=rule.code,
        kind=Reason.KIND_RULE,
        effect=effect,
        facts=facts,
        text_zh=rule.zh if effect == Reason.EFFECT_DECLINE else f"接近：{rule.zh}",
        text_en=rule.en if effect == Reason.EFFECT_DECLINE else f"close to: {rule.en}",
        authority=rule.authority,
    )


def _waived(source: str) -> Reason:
    return Reason(
        code=f"WITHOUT_{source.upper()}",
        kind=Reason.KIND_EVIDENCE,
        effect=Reason.EFFECT_WAIVED,
        facts=[Fact(attribute=source, source=source)],
        text_zh=f"未取得{source}数据，按政策以较低额度批准",
        text_en=f"approved without {source}, at a lower limit, as policy allows",
    )
