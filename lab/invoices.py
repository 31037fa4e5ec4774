"""From invoices to the tax authority's facts: one definition, for training and for the sandbox.

All figures are over the 365 days that end with the last invoice date of the whole data set, unless said otherwise.
Void invoices count only in the void ratio; negative amounts are refunds. CNY in, fen out.
"""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import polars as pl

YEAR = dt.timedelta(days=365)


class CannotReadInvoices(OSError):
    """The invoices are not there, or are none; the text names the file."""


def read_invoices(folder: Path) -> pl.DataFrame:
    """The invoices of all firms. Raises CannotReadInvoices."""
    file = folder / "cn_sme_invoices.parquet"
    try:
        invoices = pl.read_parquet(file).with_columns(
            pl.col("firm", "dir", "grp").cast(pl.String),
            pl.col("amount").cast(pl.Float64),
            pl.col("date").cast(pl.Datetime("us")),
            pl.col("valid").cast(pl.Boolean),
            pl.col("cpty"),
        )
    except (OSError, pl.exceptions.PolarsError) as error:
        raise CannotReadInvoices(f"{file}: {str(error).splitlines()[0]}") from error
    if invoices.is_empty():
        raise CannotReadInvoices(f"{file}: holds no invoices")
    return invoices


def tax_facts(invoices: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """Facts by firm, under the names of the attribute dictionary without `tax.`; None where undefined.

    sales_growth: sales over those of the 365 days before, less 1; None without sales then.
    gross_margin: (sales - purchases) / sales; None without sales. sales_refund_ratio: refunds over gross sales.
    sales_volatility: standard deviation over mean of the 12 months' sales (blocks of 365/12 days).
    months_without_sales_12m: such blocks without a sale. months_active: calendar months with any valid invoice, ever.
    top_*_share: the largest counterparty's part of gross amounts.
    """
    last: Any = invoices["date"].max()
    block = ((last - pl.col("date")).dt.total_days() // (365 / 12)).clip(0, 11).cast(pl.Int64)
    valid = invoices.filter(pl.col("valid"))
    year = valid.filter(pl.col("date") > last - YEAR).with_columns(block.alias("block"))
    before = valid.filter((pl.col("date") <= last - YEAR) & (pl.col("date") > last - 2 * YEAR))
    facts: dict[str, dict[str, Any]] = {firm: {} for firm in invoices["firm"].unique().sort()}

    def put(name: str, frame: pl.DataFrame) -> None:
        for firm, value in frame.iter_rows():
            facts[firm][name] = value

    amount, sold, bought = pl.col("amount"), pl.col("dir") == "out", pl.col("dir") == "in"
    put("sales", year.filter(sold).group_by("firm").agg(amount.sum()))
    put("purchases", year.filter(bought).group_by("firm").agg(amount.sum()))
    put("sales_before", before.filter(sold).group_by("firm").agg(amount.sum()))
    put("gross", year.filter(sold & (amount > 0)).group_by("firm").agg(amount.sum()))
    put("refunds", year.filter(sold & (amount < 0)).group_by("firm").agg(-amount.sum()))
    put("months_active", valid.group_by("firm").agg(pl.col("date").dt.truncate("1mo").n_unique()))
    put("sold", year.filter(sold).group_by("firm").agg(pl.len()))
    void = invoices.filter(sold & (pl.col("date") > last - YEAR)).group_by("firm").agg((~pl.col("valid")).mean())
    put("sales_void_ratio", void)
    monthly = year.filter(sold).group_by("firm", "block").agg(amount.sum())
    for firm in facts:
        facts[firm]["monthly"] = [0.0] * 12
    for firm, number, value in monthly.iter_rows():
        facts[firm]["monthly"][number] = value
    for word, share, way in (("customer", "top_customer_share", sold), ("supplier", "top_supplier_share", bought)):
        parties = year.filter(way & (amount > 0)).group_by("firm", "cpty").agg(amount.sum())
        put(f"{word}_count", parties.group_by("firm").agg(pl.len()))
        put(share, parties.group_by("firm").agg(amount.max() / amount.sum()))
    return {firm: _finished(raw) for firm, raw in facts.items()}


def _finished(raw: dict[str, Any]) -> dict[str, Any]:
    sales, purchases, before = raw.get("sales", 0.0), raw.get("purchases", 0.0), raw.get("sales_before", 0.0)
    monthly = raw["monthly"]
    mean = sum(monthly) / 12
    deviation = (sum((m - mean) ** 2 for m in monthly) / 12) ** 0.5
    gross = raw.get("gross", 0.0)
    return {
        "months_active": int(raw.get("months_active", 0)),
        "sales_12m_fen": round(sales * 100),
        "purchases_12m_fen": round(purchases * 100),
        "sales_growth": sales / before - 1 if before > 0 else None,
        "gross_margin": (sales - purchases) / sales if sales > 0 else None,
        "sales_void_ratio": raw.get("sales_void_ratio"),
        "sales_refund_ratio": raw.get("refunds", 0.0) / gross if gross > 0 else None,
        "sales_volatility": deviation / mean if mean > 0 else None,
        "months_without_sales_12m": sum(m <= 0 for m in monthly),
        "sales_invoices_per_month": raw.get("sold", 0) / 12,
        "customer_count": int(raw.get("customer_count", 0)),
        "top_customer_share": raw.get("top_customer_share"),
        "supplier_count": int(raw.get("supplier_count", 0)),
        "top_supplier_share": raw.get("top_supplier_share"),
    }
