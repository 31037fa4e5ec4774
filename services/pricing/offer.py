"""Offers: the amount that every bound allows, at a rate within every cap, with its exact instalments."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from decimal import Decimal

from lending.pricing.v1.pricing_service_pb2 import PriceApplicationsRequest
from lending.type.v1.offer_pb2 import Offer

from services.pricing.evidence import Evidence, stamp
from services.pricing.limit import Bound, bounds
from services.pricing.policy import Policy, Product, Range
from services.pricing.rate import Rate, build_rate, nominal_most_ppm
from services.pricing.schedule import effective_ppm, payments_fen

TERM_STEP_MONTHS = 6
"""Longer terms are tried at whole half-years."""
_TRIES = 100


def make_offers(
    item: PriceApplicationsRequest.Item,
    policy: Policy,
    product: Product,
    known: Evidence,
    evidence_share: Decimal | None,
    term: int,
    terms: Range,
    may_run: Callable[[int], bool],
    now: dt.datetime,
    day: dt.date,
) -> tuple[list[Offer], list[Bound]]:
    """Offers, best first, and the bounds at `term`. No offer where no amount from the product's least up is left.

    Where a person's income bound the amount, the shortest longer term that `may_run` and carries what was asked is
    offered too, or the longest where none does.
    """
    cap_amount = policy.cap("amount_fen", product.party, day)
    cap_all_in = policy.cap("irr_ppm", product.party, day)
    apr_most = nominal_most_ppm(cap_all_in.value) if cap_all_in else product.apr_ppm.max
    rate = build_rate(item.score.pd, product, policy.market, apr_most)

    def bounds_at(months: int) -> list[Bound]:
        return bounds(product, item.score.grade, months, rate.apr_ppm, known, cap_amount, evidence_share)

    def amount(found: list[Bound]) -> int:
        return min(item.loan.amount_fen, found[0].amount_fen)

    found = bounds_at(term)
    chosen = [(amount(found), term)]
    income_bound = any(b.code == "LIMIT_INCOME" and b.amount_fen < item.loan.amount_fen for b in found)
    if income_bound and chosen[0][0] < item.loan.amount_fen:
        longer = [m for m in range(term + 1, terms.max + 1) if m % TERM_STEP_MONTHS == 0 or m == terms.max]
        alternative = (0, 0)
        for months in longer:
            if alternative[0] < item.loan.amount_fen and may_run(months):
                alternative = max(alternative, (amount(bounds_at(months)), months))
        if alternative[0] > chosen[0][0]:
            chosen.append(alternative)
    cap_ppm = cap_all_in.value if cap_all_in else None
    worth = [(fen, months) for fen, months in chosen if fen >= product.amount_fen.min]
    return [
        _offer(f"offer-{n}", product, fen, months, rate, cap_ppm, now) for n, (fen, months) in enumerate(worth, 1)
    ], found


def _offer(
    offer_id: str, product: Product, amount_fen: int, months: int, rate: Rate, cap_ppm: int | None, now: dt.datetime
) -> Offer:
    for _ in range(_TRIES):
        payments = payments_fen(amount_fen, rate.apr_ppm, months)
        irr_ppm = effective_ppm(amount_fen, payments)
        if cap_ppm is None or irr_ppm <= cap_ppm:
            break
        # Instalments rounded up to whole fen can cost a shade more than the nominal rate says.
        lower = max(0, rate.apr_ppm - max(1, irr_ppm - cap_ppm))
        rate = rate.held_at(lower, "held at the legal cap on the all-in cost")
    else:
        raise ArithmeticError("no rate keeps this loan within the legal cap on the all-in cost")
    offer = Offer(
        offer_id=offer_id,
        product=product.name,
        principal_fen=amount_fen,
        term_months=months,
        apr_ppm=rate.apr_ppm,
        irr_ppm=irr_ppm,
        instalment_fen=payments[0],
        last_instalment_fen=payments[-1],
        total_interest_fen=sum(payments) - amount_fen,
    )
    for line in rate.components:
        offer.rate_components.add(component=line.name, rate_ppm=line.rate_ppm, basis=line.basis)
    offer.expire_time.CopyFrom(stamp(now + dt.timedelta(days=product.offer_days)))
    return offer
