"""An overlay, tried on a real cluster: applied, looked at, scaled, released, a node drained, and cleaned up.

    python -m lab.kube.verify [--context NAME] [--kubeconfig FILE] [--overlay NAME] [--within SECONDS] [--keep] [--json]

Everything it makes stands in the overlay's namespace, which must not be there before, and goes in the end, after Ctrl-C
too. Ends with 0 where all held, 1 where something did not, 2 where there is no such overlay, 3 where no cluster
answers, 130 when interrupted. What the cluster cannot show is said.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lab.kube import check, trial
from lab.kube.availability import NAME, Watched, Watching, is_ready
from lab.kube.cluster import Cluster, Data, Kubectl, Refused, Unreachable
from lab.kube.completeness import bounds, scaler_of
from lab.kube.overlay import CannotBuild, Object, Overlay, build
from lab.kube.report import Report, summed_up
from loanmesh.runtime.clock import Clock, SystemClock

LOOK_EVERY_S = 2.0
UNREACHABLE, INTERRUPTED = 3, 130
SIMULATED = "kwok.x-k8s.io/node"
"""Annotation of nodes that kwok plays."""
ZONE = "topology.kubernetes.io/zone"
OPERATORS = {
    "cert-manager.io": "cert-manager",
    "keda.sh": "KEDA",
    "monitoring.coreos.com": "Prometheus' operator",
    "postgresql.cnpg.io": "CloudNativePG",
}
"""Who brings the custom resources of a group, and looks after them."""
TELLS_READY = ("Certificate", "Cluster", "Issuer", "ScaledObject")
"""Custom resources whose operator says in a condition, Ready, whether it has done what they ask for."""


class Impossible(Exception):
    """The trial cannot go on; the text says why."""


class Trial:
    """One overlay on one cluster.

    within_s  how long a step may take: until all is ready, until a release is out, until a node is empty.
    """

    def __init__(
        self,
        cluster: Cluster,
        overlay: Overlay,
        clock: Clock,
        report: Report,
        *,
        within_s: float = 300.0,
    ) -> None:
        self._cluster, self._clock, self._report = cluster, clock, report
        self._overlay = overlay
        self._within_s = within_s
        self._namespace = overlay.of("Namespace")[0].name
        self._applied: Overlay = overlay
        self._made: list[Object] = []

    async def run(self, *, keep: bool = False) -> None:
        """All steps, and the cleaning up whatever became of them. Raises Unreachable, where nothing was tried."""
        try:
            await self._look()
            await self._enforced()
            await self._apply()
            await self._stored()
            await self._scaled()
            await self._released()
            await self._drained()
        except Unreachable:
            raise
        except asyncio.CancelledError:
            self._report.failed("trial", "interrupted")
            self._report.progress("interrupted: cleaning up; once more, and what was made is left there")
            raise
        except (Impossible, Refused) as error:
            self._report.failed("trial", str(error))
        finally:
            if keep and self._made:
                self._report.not_tried("clean up", f"asked to keep: {self.by_hand}")
            elif self._made:
                await self._clean_up()

    @property
    def by_hand(self) -> str:
        """How to delete what was made and is still there; empty where nothing is."""
        words = " ".join(f"{found.kind.lower()}/{found.name}" for found in reversed(self._made))
        return f"kubectl delete {words}" if words else ""

    # --- What there is ---

    async def _look(self) -> None:
        version, nodes = await self._cluster.version(), await self._cluster.all("nodes")
        zones = {node["metadata"].get("labels", {}).get(ZONE, "none") for node in nodes}
        self._report.ok("cluster", f"{version}, {len(nodes)} nodes in {len(zones)} zones")
        if any(SIMULATED in (node["metadata"].get("annotations") or {}) for node in nodes):
            self._report.not_tried("containers", "nodes are played by kwok: pods are scheduled, no container runs")
        if await self._cluster.get("namespace", self._namespace):
            raise Impossible(
                f"namespace {self._namespace} is there already; what this makes it deletes, so it touches none that it "
                f"did not make: kubectl delete namespace {self._namespace}, or use another cluster"
            )
        kinds = await self._cluster.kinds()
        known = [found for found in self._overlay.objects if (str(found.data["apiVersion"]), found.kind) in kinds]
        unknown = [found for found in self._overlay.objects if found not in known]
        left_out = Counter(found.kind for found in unknown)
        if left_out:
            names = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
            missing = ", ".join(sorted({_operator(found) for found in unknown}))
            text = f"the cluster does not know {names}: left out; {missing} would bring them"
            self._report.not_tried("custom resources", text)
        self._applied = Overlay(known)
        self._left_out = sorted(left_out)

    # --- Pod Security ---

    async def _enforced(self) -> None:
        """The namespace comes first, and refuses a pod that is privileged."""
        first = [found for found in self._applied.objects if found.kind in ("Namespace", "PriorityClass")]
        for found in first:
            if await self._cluster.get(found.kind, found.name) is None:
                self._made.append(found)
        await self._cluster.apply([found.data for found in first])
        container = {"name": "bad", "image": "bad:1", "securityContext": {"privileged": True}}
        bad = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "privileged", "namespace": self._namespace},
            "spec": {"containers": [container]},
        }
        try:
            await self._cluster.apply([bad], dry=True)
        except Refused as error:
            if "PodSecurity" in str(error):
                self._report.ok("pod security", "restricted is enforced: a privileged pod was refused")
            else:
                self._report.failed("pod security", f"a privileged pod was refused, but not for that: {error}")
        else:
            self._report.failed("pod security", "a privileged pod was taken: restricted is not enforced")

    # --- Apply, and wait for every pod ---

    async def _apply(self) -> None:
        wanted = trial.missing(self._applied, self._left_out)
        if wanted:
            with tempfile.TemporaryDirectory(prefix="loanmesh-verify-") as folder:
                now = self._clock.now()
                made = await trial.secrets(wanted, self._applied, self._namespace, Path(folder), now)
            await self._cluster.apply(made)
            self._report.ok("secrets", f"made for the trial: {', '.join(sorted(wanted))}")
        await self._cluster.apply([found.data for found in self._applied.objects])
        for name, least in self._floors().items():
            # What scales it is not here; it then has one replica, where its autoscaler would see to more.
            if not self._autoscaled(name):
                await self._cluster.scale(name, self._namespace, least)
        await self._all_ready("apply")
        pods = await self._pods()
        jobs = [found for found in self._applied.workloads if found.object.kind == "Job"]
        self._report.ok("apply", f"{len(self._applied.objects)} objects; {len(pods)} pods ready, {len(jobs)} jobs done")

    def _floors(self) -> dict[str, int]:
        """Fewest replicas of each service, by the autoscaler of the whole overlay."""
        return {
            workload.name: bounds(scaler)[0]
            for workload in self._applied.services()
            if (scaler := scaler_of(self._overlay, workload.name))
        }

    def _autoscaled(self, name: str) -> bool:
        return scaler_of(self._applied, name) is not None

    async def _pods(self) -> list[Data]:
        """Those that serve or are about to; jobs' are not among them."""
        return [pod for pod in await self._cluster.all("pods", self._namespace) if not _finished(pod)]

    async def _all_ready(self, step: str) -> None:
        """Wait until every pod is there and ready, every release out and every job done."""

        async def waiting_for() -> list[str]:
            return [line async for line in self._unready()]

        await self._until(step, waiting_for)

    async def _unready(self) -> AsyncIterator[str]:
        # Causes first: what operators have not made, pods wait for.
        async for line in self._unlooked_at():
            yield line
        for workload in self._applied.workloads:
            kind, name = workload.object.kind, workload.name
            found = await self._cluster.get(kind, name, self._namespace)
            if found is None:
                # A job that is done may be gone: it was told to.
                if kind != "Job":
                    yield f"{kind} {name} is not there"
                continue
            if waits := _waits(kind, name, found, self._floors().get(name, 1)):
                yield waits
        for pod in await self._pods():
            if not is_ready(pod):
                yield f"pod {pod['metadata']['name']}: {_why(pod)}"

    async def _unlooked_at(self) -> AsyncIterator[str]:
        """One line for each operator that has not done its work."""
        said = set()
        for found in self._applied.objects:
            if found.kind in TELLS_READY and (operator := _operator(found)) not in said:
                kind = ".".join([found.kind, *reversed(str(found.data["apiVersion"]).split("/"))])
                if waits := _unlooked(await self._cluster.get(kind, found.name, self._namespace)):
                    said.add(operator)
                    yield f"{found}: {operator} {waits}"

    async def _until(self, step: str, waiting_for: Callable[[], Awaitable[list[str]]]) -> None:
        give_up = self._clock.monotonic() + self._within_s
        said = ""
        while rest := await waiting_for():
            if self._clock.monotonic() > give_up:
                waited = f"{step}: after {self._within_s:g} s still waiting for {'; '.join(rest[:8])}"
                raise Impossible("; ".join([waited, *await self._refusals()]))
            if rest[0] != said:
                said = rest[0]
                self._report.progress(f"{step}: waiting for {len(rest)}, first: {said}")
            await self._clock.sleep(LOOK_EVERY_S)

    async def _refusals(self) -> list[str]:
        """Why pods were not even made: a quota, an admission policy. Nothing but events says so."""
        events = await self._cluster.all("events", self._namespace)
        said = [str(event.get("message", "")) for event in events if event.get("reason") == "FailedCreate"]
        alike = dict.fromkeys(re.sub(r'pods "[^"]*"', "pods", text) for text in said)
        return [f"the cluster refuses pods: {text}" for text in list(alike)[:3]]

    # --- What the API server made of it ---

    async def _stored(self) -> None:
        for kind in ("HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy"):
            sent = self._applied.of(kind)
            stored = {found.name: await self._cluster.get(kind, found.name, self._namespace) for found in sent}
            wrong = [f"{one} is not there" for one in sent if stored[one.name] is None]
            for one in sent:
                wrong += [
                    f"{one} {text}" for text in differences(one.spec, (stored[one.name] or {}).get("spec"), "spec")
                ]
            look = {"HorizontalPodAutoscaler": self._autoscalers, "PodDisruptionBudget": self._budgets}.get(kind)
            present = {name: data for name, data in stored.items() if data}
            if sent:
                wrong += list(look(present)) if look else []
                self._report.judge(kind, wrong, f"{len(sent)} stored as sent")
        self._report.not_tried("NetworkPolicy", "whether the network keeps to them: that is the network plugin's doing")

    def _autoscalers(self, stored: Mapping[str, Data]) -> Iterator[str]:
        blind = []
        for name, data in stored.items():
            conditions = {one["type"]: one for one in data.get("status", {}).get("conditions") or ()}
            if conditions.get("AbleToScale", {}).get("status") != "True":
                yield f"{name}: cannot scale: {conditions.get('AbleToScale', {}).get('message', 'no such condition')}"
            if conditions.get("ScalingActive", {}).get("status") == "False":
                blind.append(f"{name} ({conditions['ScalingActive'].get('reason')})")
        if blind:
            self._report.not_tried("scaling by load", f"the cluster measures no pods: {', '.join(blind)}")

    def _budgets(self, stored: Mapping[str, Data]) -> Iterator[str]:
        floors = self._floors()
        for name, data in stored.items():
            status = data.get("status", {})
            if status.get("expectedPods") != floors.get(name, status.get("expectedPods")):
                yield f"{name}: counts {status.get('expectedPods')} pods, {floors[name]} are there"
            if status.get("disruptionsAllowed") != 1:
                yield f"{name}: allows {status.get('disruptionsAllowed')} disruptions, not 1"

    # --- Scale, release, drain ---

    async def _scaled(self) -> None:
        """One service up by two and back."""
        name = "intake-worker"
        before = self._floors()[name]
        await self._cluster.scale(name, self._namespace, before + 2)
        await self._replicas(name, before + 2)
        pods = [pod for pod in await self._pods() if pod["metadata"]["labels"].get(NAME) == name]
        skew = await self._skew(pods)
        await self._cluster.scale(name, self._namespace, before)
        await self._replicas(name, before)
        if skew is None:
            self._report.not_tried("spread", "the nodes are in one zone, or in none")
        else:
            self._report.judge("spread", [f"zones differ by {skew}"] if skew > 1 else [], f"zones differ by {skew}")
        self._report.ok("scale", f"{name} {before} -> {before + 2} -> {before}")

    async def _replicas(self, name: str, count: int) -> None:
        async def waiting_for() -> list[str]:
            found = await self._cluster.get("Deployment", name, self._namespace) or {}
            status = found.get("status", {})
            there, ready = status.get("replicas", 0), status.get("availableReplicas", 0)
            return [] if there == ready == count else [f"{name}: {ready} of {count} serve, {there} are there"]

        await self._until("scale", waiting_for)

    async def _skew(self, pods: Sequence[Data]) -> int | None:
        zones = {
            node["metadata"]["name"]: node["metadata"].get("labels", {}).get(ZONE)
            for node in await self._cluster.all("nodes")
        }
        if len(set(zones.values())) < 2:
            return None
        counts = Counter(zones.get(pod["spec"].get("nodeName", "")) for pod in pods)
        every = [counts.get(zone, 0) for zone in set(zones.values())]
        return max(every) - min(every)

    async def _released(self) -> None:
        """Every pod of every service is replaced; never were there fewer that serve than before."""
        floors = self._floors()
        before = await self._serving()
        async with Watching(self._cluster, self._namespace, floors, floors) as seen:
            for name in floors:
                await self._cluster.restart(name, self._namespace)
            await self._all_ready("release")
            await self._told("release", seen)
            kept = before.keys() & (await self._serving()).keys()
        wrong = [*seen.broken, *(f"pod {before[uid]['metadata']['name']} was not replaced" for uid in kept)]
        self._report.judge("release", wrong, f"{len(before)} pods replaced; fewest ready {_counts(seen.fewest)}")

    async def _told(self, step: str, seen: Watched) -> None:
        """Wait until the watch has told of all that serve now: then it has told of all that went before, too."""

        async def waiting_for() -> list[str]:
            rest = (await self._serving()).keys() ^ seen.ready
            return [f"the watch is behind by {len(rest)} pods"] if rest else []

        await self._until(step, waiting_for)

    async def _serving(self) -> dict[str, Data]:
        """Pods of our services that serve, by uid."""
        return {pod["metadata"]["uid"]: pod for pod in await self._pods() if self._ours(pod) and is_ready(pod)}

    def _ours(self, pod: Data) -> bool:
        return pod["metadata"].get("labels", {}).get(NAME) in self._floors()

    async def _drained(self) -> None:
        """A node is emptied; the budgets hold, and all its pods serve elsewhere."""
        node = await self._node_to_drain()
        if node is None:
            return
        floors = self._floors()
        on_it = [pod for pod in await self._pods() if pod["spec"].get("nodeName") == node and self._ours(pod)]
        needed = {name: count - 1 for name, count in floors.items()}
        async with self._cordoned(node), Watching(self._cluster, self._namespace, floors, needed) as seen:
            await self._cluster.drain(node, self._within_s)
            await self._all_ready("drain")
            await self._told("drain", seen)
            left = [
                pod["metadata"]["name"]
                for pod in await self._pods()
                if pod["spec"].get("nodeName") == node and not _of_every_node(pod)
            ]
        wrong = [*seen.broken, *(f"pod {name} is still on {node}" for name in left)]
        fine = f"{node} emptied of {len(on_it)} pods; fewest ready {_counts(seen.fewest)}"
        self._report.judge("drain", wrong, fine)

    async def _node_to_drain(self) -> str | None:
        nodes = [node for node in await self._cluster.all("nodes") if not node["spec"].get("unschedulable")]
        if len(nodes) < 2:
            self._report.not_tried("drain", "there is one node only: its pods would have nowhere to go")
            return None
        pods = await self._pods()
        # Storage that is tied to a node keeps its pod there.
        tied = {
            pod["spec"].get("nodeName")
            for pod in pods
            if any("persistentVolumeClaim" in volume for volume in pod["spec"].get("volumes") or ())
        }
        counts = Counter(pod["spec"].get("nodeName") for pod in pods if self._ours(pod))
        free = [name for name, _ in counts.most_common() if name not in tied]
        if not free:
            self._report.not_tried("drain", "every node with services on it holds a database as well")
            return None
        return str(free[0])

    @asynccontextmanager
    async def _cordoned(self, node: str) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._cluster.uncordon(node)

    # --- Clean up ---

    async def _clean_up(self) -> None:
        wrong, count = [], len(self._made)
        for found in reversed(self._made.copy()):
            self._report.progress(f"clean up: deleting {found}")
            try:
                await self._cluster.delete(found.kind, found.name, self._within_s)
                self._made.remove(found)
            except Refused as error:
                wrong += [f"{found} is still there: {error}", *await self._holds(found)]
        self._report.judge("clean up", wrong, f"{count} deleted, with all in them")

    async def _holds(self, found: Object) -> list[str]:
        """Why something that is to go is still there, in the cluster's words."""
        try:
            stored = await self._cluster.get(found.kind, found.name) or {}
        except Refused:
            return []  # It does not answer any more; the first complaint says so.
        conditions = (stored.get("status") or {}).get("conditions") or ()
        return [str(one["message"]) for one in conditions if one.get("status") == "True" and one.get("message")]


def differences(sent: Any, stored: Any, at: str) -> Iterator[str]:
    """Where what is stored lacks or changes something that was sent. The server may add."""
    if isinstance(sent, Mapping) and isinstance(stored, Mapping):
        for key, value in sent.items():
            yield from differences(value, stored.get(key), f"{at}.{key}")
    elif isinstance(sent, list) and isinstance(stored, list) and len(sent) == len(stored):
        for index, (one, other) in enumerate(zip(sent, stored, strict=True)):
            yield from differences(one, other, f"{at}[{index}]")
    # What is empty need not be stored at all.
    elif sent != stored and (sent or stored):
        yield f"{at}: sent {sent!r}, stored {stored!r}"


def _finished(pod: Data) -> bool:
    return (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed")


def _waits(kind: str, name: str, found: Data, floor: int) -> str:
    """What a workload is not yet, or nothing."""
    spec, status = found.get("spec", {}), found.get("status", {})
    if kind == "Job":
        return "" if status.get("succeeded") else f"Job {name}: not done"
    if status.get("observedGeneration", 0) < found["metadata"].get("generation", 0):
        return f"{kind} {name}: not looked at yet"
    if kind == "DaemonSet":
        wanted, there = status.get("desiredNumberScheduled", 0), status.get("currentNumberScheduled", 0)
        fresh, serve = status.get("updatedNumberScheduled", 0), status.get("numberAvailable", 0)
    else:
        wanted, there = max(int(spec.get("replicas", 1)), floor), status.get("replicas", 0)
        fresh, serve = status.get("updatedReplicas", 0), status.get("availableReplicas", 0)
    if fresh == there == serve == wanted:
        return ""
    return f"{kind} {name}: {serve} of {wanted} serve, {fresh} of them new, {there} are there"


def _unlooked(stored: Data | None) -> str:
    """Why a custom resource is not ready yet, or nothing."""
    conditions = ((stored or {}).get("status") or {}).get("conditions") or ()
    ready: Data = next((one for one in conditions if one["type"] == "Ready"), {})
    if ready.get("status") == "True":
        return ""
    return f"says {ready.get('message') or ready.get('reason')}" if ready else "has not looked at it: does it run?"


def _operator(found: Object) -> str:
    group = str(found.data["apiVersion"]).partition("/")[0]
    return OPERATORS.get(group, group)


def _of_every_node(pod: Data) -> bool:
    """Whether a DaemonSet owns it: such a pod stays on a node that is drained."""
    return any(owner["kind"] == "DaemonSet" for owner in pod["metadata"].get("ownerReferences") or ())


def _why(pod: Data) -> str:
    """Why a pod is not ready, in the words of the kubelet or the scheduler."""
    status = pod.get("status") or {}
    for one in status.get("containerStatuses") or ():
        waiting = (one.get("state") or {}).get("waiting")
        if waiting:
            return f"{waiting.get('reason', 'waiting')} {waiting.get('message', '')}".strip()
    for one in status.get("conditions") or ():
        if one.get("status") == "False" and one.get("message"):
            return f"{one.get('reason', '')} {one['message']}".strip()
    return str(status.get("phase", "not ready"))


def _counts(fewest: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(fewest.items()))


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, try, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", default="", help="of the kubeconfig; its current one where none is named")
    parser.add_argument("--kubeconfig", default="", help="file; kubectl's own choice where none is named")
    parser.add_argument("--overlay", default="local", help="a name in deploy/k8s/overlays, or a folder")
    parser.add_argument("--within", type=float, default=300.0, help="seconds that a step may take")
    parser.add_argument("--keep", action="store_true", help="leave all there in the end")
    parser.add_argument("--json", action="store_true", help="one JSON document in the end")
    asked = parser.parse_args(arguments)
    if asked.within <= 0:
        parser.error("--within must be above 0")
    folder = check.folder_of(asked.overlay, parser)

    report = Report(quiet=asked.json)
    code = _tried(report, folder, asked)
    summed_up(report, asked.overlay, asked.json)
    return code


def _tried(report: Report, folder: Path, asked: argparse.Namespace) -> int:
    """Check, then try; the exit code."""
    one: Trial | None = None
    try:
        overlay = build(folder)
        wrong = [str(problem) for problem in check.problems(overlay)]
        report.judge("checker", wrong, f"{asked.overlay}: {len(overlay.objects)} objects, no problems")
        if not wrong:
            cluster = Kubectl(asked.context, asked.kubeconfig)
            one = Trial(cluster, overlay, SystemClock(), report, within_s=asked.within)
            asyncio.run(one.run(keep=asked.keep))
    except CannotBuild as error:
        report.failed("build", str(error))
    except Unreachable as error:
        report.failed("cluster", str(error))
        return UNREACHABLE
    except KeyboardInterrupt:
        if one and one.by_hand and not asked.keep:
            report.failed("clean up", f"interrupted, too: {one.by_hand}")
        return INTERRUPTED
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
