"""What `loanmesh promotion plan` writes, as kustomize builds it: on HorizontalPodAutoscalers, and on ScaledObjects."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from loanmesh.cli.main import app
from loanmesh.promotion.capacity import SERVICES, read_capacity
from loanmesh.promotion.file import read_promotion
from loanmesh.promotion.manifests import cron_window, write
from loanmesh.promotion.plan import make_plan
from tests.promotions import a_capacity, a_promotion

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "deploy" / "promotions" / "double-twelve.yaml"
OVERLAY = ROOT / "deploy" / "k8s" / "overlays" / "promotion"


def built(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder, by kind and name."""
    kubectl = str(Path(sys.executable).parent / "kubectl")
    run = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    return {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(run.stdout)}


def an_overlay(folder: Path, *resources: dict[str, Any]) -> Path:
    """An overlay with some resources and the plan beside it."""
    (folder / "resources.yaml").write_text(yaml.safe_dump_all(resources), encoding="utf-8")
    said = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", "resources": ["resources.yaml"],
        "components": ["plan"],
    }  # fmt: skip
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    return folder


def an_autoscaler(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler", "metadata": {"name": name},
        "spec": {"scaleTargetRef": {"kind": "Deployment", "name": name}, "minReplicas": 2, "maxReplicas": 8},
    }  # fmt: skip


def a_scaled_object(name: str) -> dict[str, Any]:
    trigger = {"type": "external", "metadata": {"scalerAddress": "intake-worker:7401", "service": name}}
    return {
        "apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": name},
        "spec": {"scaleTargetRef": {"name": name}, "minReplicaCount": 2, "triggers": [trigger]},
    }  # fmt: skip


def test_autoscalers_get_the_plan_as_their_floor(tmp_path: Path) -> None:
    one = a_promotion(peak=350)
    plan = make_plan(one, a_capacity(a_second=100))
    write(tmp_path / "plan", one, plan, "test.yaml")
    found = built(an_overlay(tmp_path, *(an_autoscaler(name) for name in SERVICES)))
    for name in SERVICES:
        spec = found["HorizontalPodAutoscaler", name]["spec"]
        assert (spec["minReplicas"], spec["maxReplicas"]) == (5, 50)


def test_keda_gets_a_floor_by_the_clock_beside_its_own_trigger(tmp_path: Path) -> None:
    one = a_promotion(peak=350)
    plan = make_plan(one, a_capacity(a_second=100))
    write(tmp_path / "plan", one, plan, "test.yaml")
    found = built(an_overlay(tmp_path, *(a_scaled_object(name) for name in SERVICES)))
    for name in SERVICES:
        spec = found["ScaledObject", name]["spec"]
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (2, 50)
        external, cron = spec["triggers"]
        assert external["metadata"]["service"] == name
        assert cron["type"] == "cron"
        assert cron["metadata"] == {
            "timezone": "Asia/Shanghai", "start": "50 19 12 12 *", "end": "1 21 12 12 *", "desiredReplicas": "5"
        }  # fmt: skip
        assert all(isinstance(value, str) for value in cron["metadata"].values()), "KEDA's metadata are texts"


@pytest.mark.parametrize(
    ("start", "end", "window"),
    [
        ("2026-12-31T23:55:30", "2027-01-01T00:30:01", ("45 23 31 12 *", "32 0 1 1 *")),
        ("2026-11-11T00:00:00", "2026-11-12T00:00:00", ("50 23 10 11 *", "1 0 12 11 *")),
    ],
)
def test_the_window_begins_a_lead_before_and_ends_when_the_last_is_decided(
    start: str, end: str, window: tuple[str, str]
) -> None:
    one = a_promotion(start=start, end=end)
    found = cron_window(one, make_plan(one, a_capacity(a_second=1000)))
    assert (found["start"], found["end"]) == window


@pytest.mark.skipif(not (OVERLAY / "plan").is_dir(), reason="the overlay is not there")
def test_the_overlay_that_is_shipped_is_what_the_sample_makes(tmp_path: Path) -> None:
    promotion = read_promotion(SAMPLE)
    plan = make_plan(promotion, read_capacity())
    file = write(tmp_path, promotion, plan, str(SAMPLE.relative_to(ROOT)))
    assert (OVERLAY / "plan" / "kustomization.yaml").read_text(encoding="utf-8") == file.read_text(encoding="utf-8")
    found = built(OVERLAY)
    for name in SERVICES:
        triggers = found["ScaledObject", name]["spec"]["triggers"]
        assert [t["metadata"]["desiredReplicas"] for t in triggers if t["type"] == "cron"] == [
            str(plan.services[name].replicas)
        ]


@pytest.mark.skipif(not (ROOT / "deploy" / "k8s" / "components" / "hpa").is_dir(), reason="the manifests are not there")
def test_the_sample_knows_the_autoscalers_that_are_shipped() -> None:
    said = (ROOT / "deploy" / "k8s" / "components" / "hpa" / "autoscalers.yaml").read_text(encoding="utf-8")
    shipped = {
        one["metadata"]["name"]: (one["spec"]["minReplicas"], one["spec"]["maxReplicas"])
        for one in yaml.safe_load_all(said)
    }
    ranges = read_promotion(SAMPLE).replicas
    assert {name: (one.usual, one.most) for name, one in ranges.items()} == shipped


# --- The page ---


def commands_of_the_page() -> list[list[str]]:
    page = (ROOT / "docs" / "promotions.md").read_text(encoding="utf-8")
    return [shlex.split(line)[3:] for line in page.splitlines() if line.startswith("$ loanmesh promotion ")]


@pytest.mark.parametrize("words", commands_of_the_page(), ids=" ".join)
def test_every_command_of_the_page_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(SAMPLE.parent, tmp_path / "deploy" / "promotions")
    monkeypatch.chdir(tmp_path)
    code, said, told = command(*words)
    # A day that nobody planned is shown because it goes wrong.
    assert code == (1 if "--unplanned" in words else 0), said + told
    assert "next: " in said
    if "--picture" in words:
        assert (tmp_path / words[words.index("--picture") + 1]).read_text(encoding="utf-8").startswith("<?xml")


def test_the_table_of_the_page_is_what_the_command_prints() -> None:
    page = (ROOT / "docs" / "promotions.md").read_text(encoding="utf-8")
    _, said, _ = command("plan", str(SAMPLE))
    for line in said.splitlines()[:9]:
        assert line.rstrip() in page
    assert next(line for line in said.splitlines() if line.startswith("the plan holds")) in page


# --- The command ---


def command(*words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    done = CliRunner().invoke(app, ["promotion", *words])
    return done.exit_code, done.stdout, done.stderr


def test_a_plan_is_told_and_written_and_says_what_to_do_next(tmp_path: Path) -> None:
    code, said, _ = command("plan", str(SAMPLE), "--out", str(tmp_path / "plan"))
    assert code == 0
    assert "the plan holds" in said
    assert "next: `loanmesh promotion simulate" in said
    assert "kubectl apply -k deploy/k8s/overlays/promotion" in said
    assert (tmp_path / "plan" / "kustomization.yaml").is_file()


def test_a_plan_that_does_not_hold_ends_with_1_and_says_whom_to_ask() -> None:
    code, said, _ = command("plan", str(SAMPLE), "--scale", "2")
    assert code == 1
    assert "bound by: quota of tax" in said
    assert "ask tax for" in said
    code, said, _ = command("plan", str(SAMPLE), "--scale", "2", *(
        word for name in ("tax", "central_bank", "bank_flow") for word in ("--quota", f"{name}=2000")
    ))  # fmt: skip
    assert (code, "the plan holds" in said) == (0, True)


def test_machines_get_one_object_and_people_still_hear(tmp_path: Path) -> None:
    code, said, told = command("plan", str(SAMPLE), "--scale", "1000", "--json", "--out", str(tmp_path))
    plan = json.loads(said)
    assert code == 1
    assert plan["holds"] is False
    assert plan["decided_within_s"] is None, "JSON has no infinity"
    assert plan["services"]["bureau"]["replicas"] == 2
    assert "does not hold" in told


def test_a_day_without_its_plan_is_told_with_the_hour_of_its_backlog() -> None:
    small = str(SAMPLE.with_name("small.yaml"))
    code, said, _ = command("simulate", small, "--scale", "100", "--unplanned", "--json", "--quota", "tax=12000")
    day = json.loads(said)
    assert code == 1
    assert day["holds"] is False
    assert day["backlog_peak_at"] == "2026-12-01 20:00"
    assert day["plan"]["services"]["intake"]["replicas"] == 6


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("plan", "no.yaml"), "no.yaml: cannot be read: No such file"),
        (("plan", str(SAMPLE), "--quota", "taxes=3"), "must be SOURCE="),
        (("plan", str(SAMPLE), "--quota", "tax=-3"), "must be SOURCE="),
        (("plan", str(SAMPLE), "--capacity", str(SAMPLE)), "there is no such field"),
        (("plan", str(SAMPLE), "--out", str(SAMPLE)), "cannot be written"),
        (("simulate", str(SAMPLE), "--picture", "no/folder/day.svg"), "cannot be written"),
        (("simulate", str(SAMPLE), "--picture", "day.txt"), "its name must end in .svg, .png, .pdf"),
        (("capacity", "no.json"), "`make bench ONLY=core` writes it"),
    ],
)
def test_what_cannot_be_used_ends_with_2_and_says_why(
    words: tuple[str, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, told = command(*words)
    assert code == 2
    assert says in " ".join((said + told).split())


def test_what_is_not_installed_is_named_with_the_way_to_get_it() -> None:
    without = "import sys; sys.modules['simpy'] = None; from loanmesh.cli.main import app; app()"
    run = subprocess.run([sys.executable, "-c", without, "promotion", "simulate", str(SAMPLE)],
                         capture_output=True, text=True, check=False, timeout=60)  # fmt: skip
    assert run.returncode == 1
    assert "needs simpy, which is not installed: pip install 'loanmesh[lab]'" in run.stdout + run.stderr


def test_capacity_is_written_from_a_benchmark(tmp_path: Path) -> None:
    rounds = {name: {"cpu_ms": {"intake": 1.5, "bureau": 1.9, "scoring": 0.25, "pricing": 0.43}}
              for name in ("one by one, cold", "one by one, warm", "accepts one by one")}  # fmt: skip
    bench = {"quick": False, "machine": {"cores": 2, "kind": "x", "python": "3.11"}, "measured": {"core": rounds}}
    (tmp_path / "bench.json").write_text(json.dumps(bench), encoding="utf-8")
    out = tmp_path / "capacity.yaml"
    code, _, told = command("capacity", str(tmp_path / "bench.json"), "--out", str(out))
    assert code == 0
    assert "next: `loanmesh promotion plan FILE --capacity" in told
    assert read_capacity(out).cpu_ms["intake"].cold == 1.5
    assert command("plan", str(SAMPLE), "--capacity", str(out))[0] == 0
