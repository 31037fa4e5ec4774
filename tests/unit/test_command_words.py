"""What the command says when a file, a folder or a table is not as it should be."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import get_args

import pytest
from lending.bureau.v1.bureau_service_pb2 import SourceReport
from lending.intake.v1 import intake_service_pb2 as pb
from rich.console import Console
from typer.testing import CliRunner

from loanmesh.cli import show
from loanmesh.cli.firms import COLUMN, FILE, CannotRead, check_writable, cny, read_firms, request_for, write_csv
from loanmesh.cli.main import app
from loanmesh.cli.stages import CONCLUDE, GATHER, PRICE, SCORE, Stages
from services.pricing.policy import load_policy
from services.pricing.rate import build_rate

POLICY = load_policy("cn-demo-2026-11")
NAME = "lenders/demo/applications/01a20b7e-4166-799b-be1e-d731f8cb7c69"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"{COLUMN},x\nE1,2\nF2,3\n", ":3:1: "),
        (f"x,{COLUMN}\n12,E1\n345,E²\n", ":3:5: "),
        (f"x,{COLUMN}\n12\n", ":2:4: "),
        (f"{COLUMN}\nE{'9' * 30}\n", ":2:1: "),
        ("x,y\n1,2\n", ":1:1: there is no column"),
        (f"{COLUMN}\n".encode() + b"E1\nE\xff\n", ":3:2: byte 0xff"),
        (f'{COLUMN}\n"E1', ":2:1: "),
        ("", ":1:1: there is no column"),
        (None, "No such file"),
    ],
)
def test_firms_that_cannot_be_read_are_told_with_their_place(
    content: str | bytes | None, said: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / FILE).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(CannotRead) as cannot:
        read_firms(tmp_path)
    assert said in str(cannot.value)


def test_a_file_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    for out in (tmp_path, tmp_path / "no" / "folder.csv"):
        done = CliRunner().invoke(app, ["decide-firms", str(tmp_path), "--out", str(out)])
        assert done.exit_code == 2
        assert "--out" in done.output
        assert "nothing was sent" in done.output


def test_looking_whether_a_file_can_be_written_changes_nothing(tmp_path: Path) -> None:
    new, old = tmp_path / "new.csv", tmp_path / "old.csv"
    old.write_text("old", encoding="utf-8")
    check_writable(new)
    check_writable(old)
    assert not new.exists()
    assert old.read_text(encoding="utf-8") == "old"


def test_a_state_that_is_no_folder_is_told(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.touch()
    for state in (file, file / "below", Path("/proc/nothing")):
        done = CliRunner().invoke(app, ["up", "--state", str(state)])
        assert done.exit_code == 2
        assert "--state" in done.output
        assert isinstance(done.exception, SystemExit)


@pytest.mark.parametrize("width", [20, 80, 200])
def test_a_list_cuts_no_name(width: int) -> None:
    printed = io.StringIO()
    show.applications(Console(file=printed, width=width), [pb.Application(name=NAME)] * 2)
    assert printed.getvalue().count(NAME) == 2
    assert len(printed.getvalue().splitlines()) == 3


def test_the_same_firm_asks_the_same_whenever_it_asks() -> None:
    _, key = request_for("E124", 50_000_000, 12)
    # Pinned: another key would decide every firm anew.
    assert key == "0b47c2a9-5dba-50a3-be67-0967613e50c8"
    assert request_for("E124", 50_000_000, 12)[1] == key != request_for("E125", 50_000_000, 12)[1]


def test_money_in_the_csv_is_whole_or_has_two_decimals(tmp_path: Path) -> None:
    assert [cny(50_000_000), cny(50_000_005), cny(5)] == ["500000", "500000.05", "0.05"]
    application = pb.Application(name=NAME, state=pb.Application.STATE_DECIDED)
    offer = application.decision.offers.add(principal_fen=50_000_000, apr_ppm=98_700, term_months=12)
    assert offer.term_months == 12
    write_csv(tmp_path / "firms.csv", {"E1": application})
    assert (tmp_path / "firms.csv").read_text(encoding="utf-8").splitlines()[1].endswith(",500000,0.098700,12")


def test_time_is_told_by_stage_from_what_was_stored() -> None:
    application, told = pb.Application(), pb.ExplainDecisionResponse()
    for time, at_ms in (
        (application.create_time, 0), (told.profile.gather_time, 70), (told.score.score_time, 73),
        (told.pricing.price_time, 80), (told.decision.decide_time, 81),
    ):  # fmt: skip
        time.FromMilliseconds(1_700_000_000_000 + at_ms)
    stages = Stages()
    stages.note_stored(application, told)
    found = {stage: round(1000 * seconds[0]) for stage, seconds in stages.seconds.items() if seconds}
    assert found == {GATHER: 70, SCORE: 3, PRICE: 7, CONCLUDE: 1}
    assert stages.table().row_count == 4


def test_an_explanation_in_chinese_holds_no_english_words() -> None:
    answer = pb.ExplainDecisionResponse(summary_zh="很遗憾。", summary_en="We are sorry.")
    answer.decision.reasons.add(text_zh="风险较高", text_en="the risk is high")
    for state in SourceReport.State.values()[1:]:
        answer.profile.reports.add(source="court", state=state)
    offer = answer.decision.offers.add(offer_id="1", apr_ppm=90_000)
    for component in build_rate(0.5, POLICY.products["firm_working_capital"], POLICY.market, 1).components:
        offer.rate_components.add(component=component.name, rate_ppm=component.rate_ppm)
    answer.schedules.add().instalments.add(number=1)
    printed = {language: io.StringIO() for language in get_args(show.Language)}
    for language, out in printed.items():
        show.explanation(Console(file=out, width=500), answer, language=language)
    assert not re.search("[A-Za-z]", printed["zh"].getvalue())
    assert "风险" not in printed["en"].getvalue()
    assert "风险较高 | the risk is high" in printed["both"].getvalue()
