"""Policy files: every rule shows its cases, and a wrong file is refused with file, rule and fault."""

import datetime as dt
from importlib import resources

import pytest

from services.pricing.policy import PARTS, CompiledRule, PolicyError, load_policy, parse_policy

POLICY = load_policy("cn-demo-2026-11")
FOLDER = resources.files("services.pricing") / "policies" / "cn-demo-2026-11"
FILES = {part: (FOLDER / f"{part}.yaml").read_text(encoding="utf-8") for part in PARTS}


@pytest.mark.parametrize("compiled", POLICY.rules, ids=lambda c: c.rule.code)
def test_every_rule_has_cases_on_both_sides_and_they_hold(compiled: CompiledRule) -> None:
    assert compiled.rule.id
    assert {example.fires for example in compiled.rule.examples} == {True, False}
    for example in compiled.rule.examples:
        assert compiled.fires(example.given) == example.fires


def test_a_rule_of_law_says_which_and_when_it_was_looked_up() -> None:
    for rule in [c.rule for c in POLICY.rules] + list(POLICY.caps):
        assert (rule.binding == "own") == (rule.authority == "")
    assert all(cap.checked_on for cap in POLICY.caps)


@pytest.mark.parametrize(("day", "fen"), [("2020-07-16", None), ("2020-07-17", 20_000_000), ("2025-03-13", 20_000_000),
                                          ("2025-03-14", 30_000_000), ("2026-11-24", 30_000_000)])  # fmt: skip
def test_the_temporary_cap_takes_the_place_of_the_older_from_its_day(day: str, fen: int | None) -> None:
    cap = POLICY.cap("amount_fen", "person", dt.date.fromisoformat(day))
    assert (cap.value if cap else None) == fen


def _rule(text: str, head: str = "id: x.y, code: X, of: [firm], zh: x, en: x") -> str:
    return f"- {{{head}, {text}}}"


COUNT = "needs: [court.enforcement_open_count]"


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        (_rule(f"{COUNT}, declines_if: court.enforcement_open_count > 0, colour: red"), "x.y: colour: Extra inputs"),
        (_rule("needs: [court.moon], declines_if: court.moon"), r"X: unknown attributes \['court.moon'\]"),
        (_rule("needs: [], declines_if: court.moon"), r"X: declines_if reads unknown attributes \['court.moon'\]"),
        (_rule("needs: [], declines_if: court.is_dishonest_debtor"), r"X: needs says \[\], declines_if reads"),
        (_rule(f"{COUNT}, declines_if: court.enforcement_open_count"), "X: declines_if answers .*, not yes or no"),
        (_rule(f"{COUNT}, declines_if: court.enforcement_open_count.startsWith('a')"), "X: declines_if"),
        (_rule("needs: [court.is_dishonest_debtor], declines_if: court.is_dishonest_debtor > 1"), "no answer for"),
        (_rule("needs: [credit.open_lines], declines_if: credit.open_lines > 9"), "is not stated of a firm"),
        (_rule(f"{COUNT}, declines_if: '(('"), "rules.yaml: X: "),
        (_rule("value: 1"), "either declines_if or caps"),
        (_rule("caps: amount_fen, value: 1, overrides: z"), "overrides z, which does not exist"),
        (_rule("caps: amount_fen, value: 1") + "\n" + _rule("caps: amount_fen, value: 1"), "x.y stands there twice"),
        (_rule("caps: amount_fen, value: 1", "id: x, code: lower, of: [firm], zh: x, en: x"), "code: String should"),
        (_rule(f"{COUNT}, declines_if: court.enforcement_open_count > 0, near_miss: {{attribute: a.x, threshold: 1}}"),
         "near_miss: a.x is no number"),
        (_rule(f"{COUNT}, declines_if: court.enforcement_open_count > 0", "code: X, of: [firm], zh: '{tax.x}', en: x"),
         r"texts name \['tax.x'\]"),
        ("just words", "is no list of rules"),
        ("- [", "rules.yaml:1:4: is no YAML: "),
    ],
)  # fmt: skip
def test_a_wrong_rule_is_refused_with_file_rule_and_fault(rules: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said) as refused:
        parse_policy("test", {**FILES, "rules": rules})
    assert str(refused.value).startswith("policy test: rules.yaml:")


@pytest.mark.parametrize(
    ("part", "old", "new", "said"),
    [
        ("products", "registry, court, bank_flow]", "registry, court, moon]", "firm_working_capital: unknown sources"),
        ("products", "min: 10000000,", "min: 900000000,", "amount_fen: Value error, min is above max"),
        ("products", 'D: "0.10", E: "0"', 'D: "0.10"', "each of the grades"),
        ("products", "    registry: {limit", "    moon: {limit", "may_do_without names"),
        ("products", 'pd_max: "0.19"', 'pd_max: "19"', "pd_max: Input should be less than or equal to 1"),
        ("market", "observed_on", "seen_on", "market.yaml: .*observed_on: Field required"),
        ("texts", "LIMIT_PRODUCT:", "LIMIT_MOON:", "texts are missing for"),
        ("texts", "最高额度为{amount}", "最高额度为{moon}", "LIMIT_PRODUCT: unknown placeholders"),
    ],
)  # fmt: skip
def test_other_wrong_files_are_refused_too(part: str, old: str, new: str, said: str) -> None:
    assert old in FILES[part]
    with pytest.raises(PolicyError, match=said):
        parse_policy("test", {**FILES, part: FILES[part].replace(old, new)})


def test_the_hash_names_every_file() -> None:
    hashes = {parse_policy("p", {**FILES, part: FILES[part] + "\n# changed"}).hash for part in PARTS}
    assert len({POLICY.hash, *hashes}) == 1 + len(PARTS)


def test_a_version_that_does_not_exist_is_named() -> None:
    with pytest.raises(PolicyError, match=r"market\.yaml is missing"):
        load_policy("moon")
