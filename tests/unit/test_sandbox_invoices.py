"""The tax authority's facts from invoices, checked against figures worked out by hand."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

pl = pytest.importorskip("polars")

LAST = dt.date(2020, 2, 28)


def facts_of(*invoices: tuple[str, int, str, float, bool]) -> dict[str, dict[str, object]]:
    """Facts from (direction, days before the last date, counterparty, CNY, valid) of firm E1; E2 sets the last date."""
    from lab.invoices import tax_facts

    rows = [
        ("E1", way, LAST - dt.timedelta(days=ago), party, amount, valid) for way, ago, party, amount, valid in invoices
    ]
    rows.append(("E2", "out", LAST, "z", 1.0, True))
    columns = {"firm": pl.String, "dir": pl.String, "date": pl.Date, "cpty": pl.String, "amount": pl.Float64,
               "valid": pl.Boolean}  # fmt: skip
    return tax_facts(pl.DataFrame(rows, schema=columns, orient="row"))


def test_a_year_of_invoices() -> None:
    facts = facts_of(
        ("out", 10, "a", 900.0, True),
        ("out", 11, "b", 300.0, True),
        ("out", 12, "a", -200.0, True),
        ("out", 13, "a", 5000.0, False),
        ("out", 100, "b", 200.0, True),
        ("in", 20, "c", 300.0, True),
        ("in", 21, "d", 100.0, True),
        ("out", 400, "a", 600.0, True),
    )["E1"]
    # Sales 900 + 300 - 200 + 200 = 1,200; the first block of 365/12 days has 1,000, the fourth 200, ten have none.
    mean = 100.0
    deviation = (((1000 - mean) ** 2 + (200 - mean) ** 2 + 10 * mean**2) / 12) ** 0.5
    assert facts == pytest.approx(
        {
            "months_active": 3,
            "sales_12m_fen": 120_000,
            "purchases_12m_fen": 40_000,
            "sales_growth": 1.0,
            "gross_margin": 800 / 1200,
            "sales_void_ratio": 1 / 5,
            "sales_refund_ratio": 200 / 1400,
            "sales_volatility": deviation / mean,
            "months_without_sales_12m": 10,
            "sales_invoices_per_month": 4 / 12,
            "customer_count": 2,
            "top_customer_share": 900 / 1400,
            "supplier_count": 2,
            "top_supplier_share": 300 / 400,
        }
    )


def test_what_is_undefined_is_none_not_zero() -> None:
    facts = facts_of(("in", 500, "c", 300.0, True), ("in", 20, "c", 50.0, False))["E1"]
    undefined = {name for name, value in facts.items() if value is None}
    assert undefined == {
        "sales_growth", "gross_margin", "sales_void_ratio", "sales_refund_ratio", "sales_volatility",
        "top_customer_share", "top_supplier_share",
    }  # fmt: skip
    assert (facts["months_active"], facts["sales_12m_fen"], facts["months_without_sales_12m"]) == (1, 0, 12)


def test_the_year_ends_with_the_last_date_and_leaves_out_its_365th_day_before() -> None:
    assert facts_of(("out", 364, "a", 10.0, True))["E1"]["sales_12m_fen"] == 1000
    assert facts_of(("out", 365, "a", 10.0, True))["E1"]["sales_12m_fen"] == 0


def test_every_fact_is_one_the_tax_authority_may_state() -> None:
    from services.bureau.sources import load_sources

    stated = {f"tax.{name}": value for name, value in facts_of(("out", 1, "a", 10.0, True))["E1"].items()}
    assert set(stated) == set(load_sources()["tax"].types["firm"])
    load_sources()["tax"].read("firm", stated)


def test_invoices_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    from lab.invoices import CannotReadInvoices, read_invoices

    file = tmp_path / "cn_sme_invoices.parquet"
    with pytest.raises(CannotReadInvoices, match="cn_sme_invoices"):
        read_invoices(tmp_path)
    file.write_bytes(b"no parquet at all")
    with pytest.raises(CannotReadInvoices, match="cn_sme_invoices"):
        read_invoices(tmp_path)
    pl.DataFrame({"firm": ["E1"]}).write_parquet(file)
    with pytest.raises(CannotReadInvoices, match="dir"):
        read_invoices(tmp_path)
