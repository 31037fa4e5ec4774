"""The trial of an overlay: what it asks of a cluster, and that it says what does not hold. The cluster is played."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from lab.kube import trial
from lab.kube.availability import NAME, Watched
from lab.kube.cluster import Data, Refused
from lab.kube.completeness import bounds
from lab.kube.container import flags
from lab.kube.overlay import OVERLAYS, Object, Overlay, Workload, build
from lab.kube.report import Report
from lab.kube.verify import Trial, differences, main
from loanmesh.runtime.clock import FakeClock

NAMESPACE = "loanmesh"
CLUSTER_WIDE = ("Namespace", "PriorityClass")


class PlayedCluster:
    """Does at once what a cluster does in time. What it is made to get wrong is set before the trial."""

    def __init__(self, nodes: int = 3) -> None:
        self.objects: dict[tuple[str, str], Any] = {}
        self.pods: dict[str, Any] = {}
        self.nodes = [_node(number) for number in range(nodes)]
        self.enforces = True
        self.never_ready = ""
        """A service whose pods stay as they are."""
        self.takes_away_first = False
        """Whether a release ends the old pods before the new ones serve."""
        self.loses = ""
        """A kind whose spec is not stored as it was sent."""
        self.evicts_all = False
        self.refuses = ""
        """Why it makes no pods at all."""
        self.holds = ""
        """Why a namespace that is deleted stays there."""
        self.operators_ready: bool | None = True
        """What operators say of custom resources; None where none runs. The cluster knows them where `custom`."""
        self.custom = False
        self.interrupted_at = ""
        """The call at which somebody presses Ctrl-C."""
        self._uids = itertools.count()
        self._events: list[tuple[str, Data]] = []

    async def version(self) -> str:
        return "v1.37.2"

    async def kinds(self) -> set[tuple[str, str]]:
        return {
            ("v1", "Namespace"), ("v1", "Secret"), ("v1", "Service"), ("v1", "ServiceAccount"), ("v1", "ConfigMap"),
            ("apps/v1", "Deployment"), ("apps/v1", "StatefulSet"), ("apps/v1", "DaemonSet"), ("batch/v1", "Job"),
            ("policy/v1", "PodDisruptionBudget"), ("autoscaling/v2", "HorizontalPodAutoscaler"),
            ("networking.k8s.io/v1", "NetworkPolicy"), ("scheduling.k8s.io/v1", "PriorityClass"),
        } | ({("cert-manager.io/v1", "Certificate")} if self.custom else set())  # fmt: skip

    async def get(self, kind: str, name: str, namespace: str = "") -> Data | None:
        found = self.objects.get((kind.partition(".")[0].lower(), name))
        if found and kind == "Deployment":
            found["status"] = self._status(found)
        return copy.deepcopy(found)

    async def all(self, kind: str, namespace: str = "") -> list[Data]:
        if kind == "events":
            return [
                {"reason": "FailedCreate", "message": f'Error creating: pods "{name}-x7" is forbidden: {self.refuses}'}
                for name in ("intake", "bureau")
                if self.refuses
            ]
        return copy.deepcopy(self.nodes if kind == "nodes" else list(self.pods.values()))

    async def apply(self, objects: Sequence[Data], *, dry: bool = False) -> None:
        for data in objects:
            if data["kind"] == "Pod":
                if self.enforces:
                    raise Refused('pods "privileged" is forbidden: violates PodSecurity "restricted:latest"')
                continue
            self._take(copy.deepcopy(data))

    async def delete(self, kind: str, name: str, within_s: float) -> None:
        self._call("delete")
        if kind == "Namespace" and self.holds:
            condition = {"type": "NamespaceDeletionDiscoveryFailure", "status": "True", "message": self.holds}
            self.objects["namespace", name]["status"] = {"conditions": [condition]}
            raise Refused("kubectl delete: timed out")
        del self.objects[kind.lower(), name]
        if kind == "Namespace":
            self.objects = {key: data for key, data in self.objects.items() if data["kind"] in CLUSTER_WIDE}
            self.pods = {}

    async def scale(self, deployment: str, namespace: str, replicas: int) -> None:
        while self._count(deployment) > replicas:
            self._end(self._of(deployment)[0])
        while self._count(deployment) < replicas:
            self._begin(deployment)
        self.objects["deployment", deployment]["spec"]["replicas"] = replicas

    async def restart(self, deployment: str, namespace: str) -> None:
        self._call("restart")
        for uid in self._of(deployment):
            if self.takes_away_first:
                self._end(uid)
                self._begin(deployment)
            else:
                self._begin(deployment)
                self._end(uid)

    async def drain(self, node: str, within_s: float) -> None:
        self._node(node)["spec"]["unschedulable"] = True
        leaving = [uid for uid, pod in self.pods.items() if pod["spec"]["nodeName"] == node]
        names = {uid: self.pods[uid]["metadata"]["labels"][NAME] for uid in leaving}
        if self.evicts_all:
            leaving = list(self.pods)
            names = {uid: self.pods[uid]["metadata"]["labels"][NAME] for uid in leaving}
            for uid in leaving:
                self._end(uid)
            for uid in leaving:
                self._begin(names[uid])
            return
        for uid in leaving:
            self._end(uid)
            self._begin(names[uid])

    async def uncordon(self, node: str) -> None:
        self._node(node)["spec"]["unschedulable"] = False

    async def watch(self, kind: str, namespace: str) -> AsyncGenerator[tuple[str, Data], None]:
        events = [("ADDED", pod) for pod in self.pods.values()]
        self._events = []
        for event in events:
            yield event
        while True:
            while self._events:
                yield self._events.pop(0)
            await FakeClock().sleep(0)

    # --- What happens by itself in a cluster ---

    def _call(self, name: str) -> None:
        if name == self.interrupted_at:
            self.interrupted_at = ""
            raise asyncio.CancelledError

    def _take(self, data: Any) -> None:
        kind, name = data["kind"], data["metadata"]["name"]
        if kind == self.loses:
            data["spec"] = {**data["spec"], **dict.fromkeys(list(data["spec"])[:1], "lost")}
        data["metadata"]["generation"] = 1
        self.objects[kind.lower(), name] = data
        if kind == "Deployment":
            self._begin(name)
        if kind == "HorizontalPodAutoscaler":
            data["status"] = {"conditions": [{"type": "AbleToScale", "status": "True"}]}
            for _ in range(bounds(Object(data))[0] - 1):
                self._begin(name)
        if kind == "PodDisruptionBudget":
            data["status"] = {"expectedPods": 2, "disruptionsAllowed": 1}
        if kind == "Certificate" and self.operators_ready is not None:
            ready = {"type": "Ready", "status": str(self.operators_ready), "message": "no such issuer"}
            data["status"] = {"conditions": [ready]}
        if kind in ("Job", "StatefulSet"):
            data["status"] = {"succeeded": 1, "observedGeneration": 1, "availableReplicas": 1, "replicas": 1}
            data["status"]["updatedReplicas"] = 1
        if kind == "DaemonSet":
            counts = ("desiredNumberScheduled", "currentNumberScheduled", "updatedNumberScheduled", "numberAvailable")
            data["status"] = {"observedGeneration": 1, **dict.fromkeys(counts, len(self.nodes))}

    def _status(self, deployment: Any) -> dict[str, int]:
        name = deployment["metadata"]["name"]
        there = self._count(name)
        deployment["spec"]["replicas"] = there
        serve = 0 if name == self.never_ready else there
        return {"observedGeneration": 1, "replicas": there, "updatedReplicas": there, "availableReplicas": serve}

    def _of(self, name: str) -> list[str]:
        return [uid for uid, pod in self.pods.items() if pod["metadata"]["labels"][NAME] == name]

    def _count(self, name: str) -> int:
        return len(self._of(name))

    def _begin(self, name: str) -> None:
        if self.refuses:
            return
        uid = str(next(self._uids))
        free = [node["metadata"]["name"] for node in self.nodes if not node["spec"]["unschedulable"]]
        ready = "False" if name == self.never_ready else "True"
        condition = {"type": "Ready", "status": ready, "reason": "Unschedulable", "message": "0/3 nodes are available"}
        emptiest = min(free, key=lambda node: sum(self.pods[own]["spec"]["nodeName"] == node for own in self._of(name)))
        self.pods[uid] = {
            "metadata": {"name": f"{name}-{uid}", "uid": uid, "labels": {NAME: name}},
            "spec": {"nodeName": emptiest},
            "status": {"phase": "Running", "conditions": [condition]},
        }
        self._events.append(("ADDED", copy.deepcopy(self.pods[uid])))

    def _end(self, uid: str) -> None:
        self._events.append(("DELETED", self.pods.pop(uid)))

    def _node(self, name: str) -> Any:
        return next(node for node in self.nodes if node["metadata"]["name"] == name)


def _node(number: int) -> Any:
    labels = {"topology.kubernetes.io/zone": f"zone-{number}"}
    return {"metadata": {"name": f"node-{number}", "labels": labels}, "spec": {"unschedulable": False}}


@pytest.fixture(scope="module")
def local() -> Overlay:
    return build(OVERLAYS / "local")


@pytest.fixture(autouse=True)
def _no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    async def certificate(*_: object) -> dict[str, str]:
        return dict.fromkeys(trial.FILES, "PEM")

    monkeypatch.setattr(trial, "certificate", certificate)


async def tried(overlay: Overlay, cluster: PlayedCluster) -> Report:
    report = Report(quiet=True)
    await Trial(cluster, overlay, FakeClock(), report, within_s=30).run()
    return report


def failures(report: Report) -> dict[str, str]:
    return {line.step: line.text for line in report.lines if line.outcome == "failed"}


async def test_a_good_overlay_holds_and_leaves_nothing_behind(local: Overlay) -> None:
    cluster = PlayedCluster()
    report = await tried(local, cluster)
    assert failures(report) == {}
    held = {line.step for line in report.lines if line.outcome == "ok"}
    assert held >= {
        "pod security",
        "apply",
        "PodDisruptionBudget",
        "NetworkPolicy",
        "scale",
        "release",
        "drain",
        "clean up",
    }
    assert (cluster.objects, cluster.pods) == ({}, {})
    assert not any(node["spec"]["unschedulable"] for node in cluster.nodes)


async def test_a_pod_that_never_gets_ready_is_named_with_its_reason(local: Overlay) -> None:
    cluster = PlayedCluster()
    cluster.never_ready = "pricing"
    said = failures(await tried(local, cluster))["trial"]
    assert "apply: after 30 s still waiting for" in said
    assert "Deployment pricing: 0 of 2 serve" in said
    assert "Unschedulable 0/3 nodes are available" in said
    assert cluster.objects == {}


async def test_a_namespace_that_takes_privileged_pods_is_found_out(local: Overlay) -> None:
    cluster = PlayedCluster()
    cluster.enforces = False
    assert "restricted is not enforced" in failures(await tried(local, cluster))["pod security"]


async def test_a_release_that_takes_replicas_away_first_is_found_out(local: Overlay) -> None:
    cluster = PlayedCluster()
    cluster.takes_away_first = True
    assert "intake: 1 ready for a while, at least 2 are to be" in failures(await tried(local, cluster))["release"]


async def test_a_drain_that_breaks_the_budgets_is_found_out(local: Overlay) -> None:
    cluster = PlayedCluster()
    cluster.evicts_all = True
    said = failures(await tried(local, cluster))["drain"]
    assert "bureau: 0 ready for a while, at least 1 are to be" in said


@pytest.mark.parametrize("kind", ["PodDisruptionBudget", "NetworkPolicy", "HorizontalPodAutoscaler"])
async def test_what_is_not_stored_as_sent_is_found_out(local: Overlay, kind: str) -> None:
    cluster = PlayedCluster()
    cluster.loses = kind
    assert "stored 'lost'" in failures(await tried(local, cluster))[kind]


async def test_a_namespace_of_somebody_else_is_left_alone(local: Overlay) -> None:
    cluster = PlayedCluster()
    theirs = {"kind": "Namespace", "metadata": {"name": NAMESPACE}}
    cluster.objects["namespace", NAMESPACE] = theirs
    assert "namespace loanmesh is there already" in failures(await tried(local, cluster))["trial"]
    assert cluster.objects == {("namespace", NAMESPACE): theirs}


async def test_pods_that_the_cluster_refuses_are_named_with_its_reason_once(local: Overlay) -> None:
    cluster = PlayedCluster()
    cluster.refuses = "images come from registry.corp only"
    said = failures(await tried(local, cluster))["trial"]
    assert (
        said.count("the cluster refuses pods: Error creating: pods is forbidden: images come from registry.corp") == 1
    )
    assert cluster.objects == {}


async def test_a_namespace_that_does_not_go_is_named_with_what_holds_it(local: Overlay) -> None:
    cluster = PlayedCluster()
    cluster.holds = "stale GroupVersion discovery: metrics.k8s.io/v1beta1"
    said = failures(await tried(local, cluster))["clean up"]
    assert "Namespace loanmesh is still there" in said
    assert cluster.holds in said


@pytest.mark.parametrize(
    ("ready", "said"),
    [
        (None, "Certificate bureau: cert-manager has not looked at it: does it run?"),
        (False, "Certificate bureau: cert-manager says no such issuer"),
    ],
)
async def test_an_operator_that_does_not_do_its_work_is_named(ready: bool | None, said: str) -> None:
    cluster = PlayedCluster()
    cluster.custom, cluster.operators_ready = True, ready
    assert said in failures(await tried(build(OVERLAYS / "production"), cluster))["trial"]


async def test_whoever_is_interrupted_cleans_up(local: Overlay) -> None:
    cluster, report = PlayedCluster(), Report(quiet=True)
    cluster.interrupted_at = "restart"
    trial_ = Trial(cluster, local, FakeClock(), report, within_s=30)
    with pytest.raises(asyncio.CancelledError):
        await trial_.run()
    assert failures(report) == {"trial": "interrupted"}
    assert (cluster.objects, trial_.by_hand) == ({}, "")


async def test_whoever_is_interrupted_while_cleaning_up_is_told_what_is_left(local: Overlay) -> None:
    cluster = PlayedCluster()
    cluster.interrupted_at = "delete"
    trial_ = Trial(cluster, local, FakeClock(), Report(quiet=True), within_s=30)
    with pytest.raises(asyncio.CancelledError):
        await trial_.run()
    assert trial_.by_hand.startswith("kubectl delete priorityclass/loanmesh-decides ")
    assert trial_.by_hand.endswith(" namespace/loanmesh")


def test_a_context_that_is_not_there_ends_with_3_and_names_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config"
    config.write_text("apiVersion: v1\nkind: Config\ncontexts: [{name: kind-loanmesh, context: {cluster: x}}]\n")
    assert main(["--context", "kind-loanmehs", "--kubeconfig", str(config)]) == 3
    out = capsys.readouterr().out
    assert 'context "kind-loanmehs" does not exist; the kubeconfig knows kind-loanmesh; name one' in out
    assert "clean up" not in out


def test_an_overlay_that_is_not_there_ends_with_2_and_names_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--overlay", "prodction"])
    assert ended.value.code == 2
    assert "prodction: neither an overlay (local, production, promotion) nor a folder" in capsys.readouterr().err


async def test_one_node_cannot_be_drained_and_that_is_said(local: Overlay) -> None:
    report = await tried(local, PlayedCluster(nodes=1))
    assert failures(report) == {}
    assert any(line.step == "drain" and line.outcome == "not_tried" for line in report.lines)


async def test_custom_resources_that_the_cluster_does_not_know_are_said() -> None:
    report = await tried(build(OVERLAYS / "production"), PlayedCluster())
    assert failures(report) == {}
    line = next(line for line in report.lines if line.step == "custom resources")
    assert line.outcome == "not_tried"
    assert "5 ScaledObject" in line.text


def test_a_watch_judges_nothing_before_all_were_in_sight() -> None:
    seen = Watched({"intake": 2}, {"intake": 2})
    pods = [_pod("intake", str(number)) for number in range(3)]
    seen.see("ADDED", pods[0])
    assert not seen.all_in_sight
    seen.see("ADDED", pods[1])
    assert (seen.all_in_sight, seen.broken) == (True, [])
    seen.see("ADDED", pods[2])
    seen.see("MODIFIED", {**pods[0], "metadata": {**pods[0]["metadata"], "deletionTimestamp": "now"}})
    assert seen.broken == []
    seen.see("DELETED", pods[1])
    assert seen.broken == ["intake: 1 ready for a while, at least 2 are to be"]


def _pod(name: str, uid: str) -> Any:
    status = {"conditions": [{"type": "Ready", "status": "True"}]}
    return {"metadata": {"uid": uid, "labels": {NAME: name}}, "status": status}


def test_the_server_may_add_but_not_change() -> None:
    assert (
        list(differences({"a": 1, "list": [{"b": 2}]}, {"a": 1, "list": [{"b": 2, "more": 0}], "c": 3}, "spec")) == []
    )
    assert list(differences({"egress": []}, {}, "spec")) == []
    assert list(differences({"a": {"b": 2}}, {"a": {}}, "spec")) == ["spec.a.b: sent 2, stored None"]
    assert list(differences({"a": [1, 2]}, {"a": [1]}, "spec")) == ["spec.a: sent [1, 2], stored [1]"]


def test_secrets_that_nobody_makes_are_made_for_the_trial(local: Overlay) -> None:
    assert sorted(trial.missing(local, [])) == ["bureau-tls", "intake-tls", "pricing-tls", "scoring-tls"]
    production = build(OVERLAYS / "production")
    assert sorted(trial.missing(production, [])) == ["bureau-keys", "intake-keys"]
    without_operators = trial.missing(production, ["Certificate", "Cluster"])
    assert {"intake-tls", "intake-db-app"} <= set(without_operators)
    assert without_operators["intake-db-ca"] == {"ca.crt"}, "the CA's key is asked for by nobody"


def test_a_container_is_started_as_its_manifest_says(local: Overlay) -> None:
    found = local.find("Deployment", "intake")
    assert found
    assert flags(Workload(found)) == [
        "--user=10001:10001", "--cpus=2.0", f"--memory={512 * 2**20}", "--read-only", "--read-only-tmpfs=false",
        "--security-opt=no-new-privileges", "--cap-drop=ALL", f"--tmpfs=/tmp:rw,size={64 * 2**20},mode=1777",
    ]  # fmt: skip
