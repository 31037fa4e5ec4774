"""The yearly rate, built up line by line from what the loan costs the lender; risk and cost alone set it (PIPL 24)."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Context, Decimal

from services.pricing.policy import Market, Product

PPM = 1_000_000
_POWER = Context(prec=20)
_BOUND = "market_bound"


@dataclass(frozen=True)
class Component:
    """One line; `rate_ppm` a year, `basis` the figures it was computed from."""

    name: str
    rate_ppm: int
    basis: str


@dataclass(frozen=True)
class Rate:
    """A nominal yearly rate and its lines, which add up to it exactly."""

    apr_ppm: int
    components: tuple[Component, ...]

    def held_at(self, apr_ppm: int, why: str) -> Rate:
        """The same build-up held at another rate; the `market_bound` line says why and takes the difference."""
        lines = tuple(line for line in self.components if line.name != _BOUND)
        rest = apr_ppm - sum(line.rate_ppm for line in lines)
        return Rate(apr_ppm, (*lines, Component(_BOUND, rest, why)) if rest else lines)


def build_rate(pd: float, product: Product, market: Market, apr_most_ppm: int) -> Rate:
    """Funding + expected loss + operating cost + capital + margin, held within the product and `apr_most_ppm`.

    `pd` is a fraction over the product's horizon. The law's `apr_most_ppm` goes before the product's lowest rate.
    """
    lgd, weight = market.lgd[product.party], market.risk_weight[product.party]
    yearly = yearly_pd(pd, product.horizon_months)
    capital = market.capital_ratio * weight * market.return_on_capital_ppm
    lines = (
        Component("funding", market.lpr_1y_ppm + market.funding_spread_ppm, f"LPR 1Y {market.lpr_1y_ppm / 1e4:.2f} % of"
                  f" {market.observed_on} + spread {market.funding_spread_ppm / 1e4:.2f} %"),
        Component("expected_loss", round(yearly * lgd * PPM), f"PD a year {yearly:.4f} x LGD {lgd}"),
        Component("operating_cost", product.operating_cost_ppm, "the product's running cost"),
        Component("capital", round(capital), f"{market.capital_ratio} x risk weight {weight} x "
                  f"{market.return_on_capital_ppm / 1e4:.1f} %"),
        Component("margin", product.margin_ppm, "the product's margin"),
    )  # fmt: skip
    cost = sum(line.rate_ppm for line in lines)
    rate = Rate(cost, lines)
    if cost < product.apr_ppm.min:
        rate = rate.held_at(product.apr_ppm.min, "held at the product's lowest rate")
    if rate.apr_ppm > product.apr_ppm.max:
        rate = rate.held_at(product.apr_ppm.max, "held at the product's highest rate")
    if rate.apr_ppm > apr_most_ppm:
        rate = rate.held_at(apr_most_ppm, "held at the legal cap on the all-in cost")
    return rate


def yearly_pd(pd: float, horizon_months: int) -> Decimal:
    """The PD of one year with the same hazard: 1 - (1 - PD)^(12 / horizon)."""
    stays = 1 - Decimal(repr(pd))
    if horizon_months == 12:
        return 1 - stays
    # A root is exact to the last digit and a fifth of the cost of a power.
    return 1 - (_POWER.sqrt(stays) if horizon_months == 24 else _POWER.power(stays, Decimal(12) / horizon_months))


def nominal_most_ppm(effective_ppm: int) -> int:
    """Highest nominal yearly rate, ppm, whose monthly compounding stays within an effective one (the stricter test)."""
    return int(12 * ((1 + effective_ppm / 1e6) ** (1 / 12) - 1) * 1e6)
