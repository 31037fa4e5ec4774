"""The yearly rate, built up line by line from what the loan costs the lender; risk and cost alone set it."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from services.pricing.policy import Market, Product

PPM = 1_000_000


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


def build_rate(pd: float, product: Product, market: Market, apr_most_ppm: int) -> Rate:
    """Funding + expected loss + operating cost + capital + margin, held within the product and `apr_most_ppm`."""
    lgd, weight = market.lgd[product.party], market.risk_weight[product.party]
    yearly = 1 - (1 - Decimal(repr(pd))) ** (Decimal(12) / product.horizon_months)
    capital = market.capital_ratio * weight * market.return_on_capital_ppm
    lines = [
        Component("funding", market.lpr_1y_ppm + market.funding_spread_ppm, f"LPR 1Y {market.lpr_1y_ppm / 1e4:.2f} % of"
                  f" {market.observed_on} + spread {market.funding_spread_ppm / 1e4:.2f} %"),
        Component("expected_loss", round(yearly * lgd * PPM), f"PD a year {yearly:.4f} x LGD {lgd}"),
        Component("operating_cost", product.operating_cost_ppm, "the product's running cost"),
        Component("capital", round(capital), f"{market.capital_ratio} x risk weight {weight} x "
                  f"{market.return_on_capital_ppm / 1e4:.1f} %"),
        Component("margin", product.margin_ppm, "the product's margin"),
    ]  # fmt: skip
    cost = sum(line.rate_ppm for line in lines)
    apr = max(product.apr_min_ppm, min(cost, product.apr_max_ppm, apr_most_ppm))
    if apr != cost:
        bound = "lowest" if apr > cost else "highest"
        lines.append(Component("market_bound", apr - cost, f"held at the {bound} rate of the product or the law"))
    return Rate(apr, tuple(lines))
