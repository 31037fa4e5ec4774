"""The manifests, checked without a cluster.

    python -m lab.kube.check [--overlay NAME] ... [--json]

Ends with 0 where all is well, 1 where something is wrong: one line a problem, object, field and rule; 2 where there is
no such overlay.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lab.kube import agreement, completeness, connections, drain, network, pod_security, schema, trust
from lab.kube.overlay import OVERLAYS, CannotBuild, Overlay, Problem, build

RULES: tuple[Callable[[Overlay], Iterable[Problem]], ...] = (
    schema.check,
    pod_security.check,
    completeness.check,
    drain.check,
    agreement.check,
    network.check,
    connections.check,
    trust.check,
)


def problems(overlay: Overlay) -> Iterator[Problem]:
    """All that is wrong. An object that breaks its schema ends the check: the other rules rely on shapes."""
    found = list(schema.check(overlay))
    yield from found
    if not found:
        for rule in RULES[1:]:
            yield from rule(overlay)


def overlays() -> list[str]:
    """Those that there are."""
    return sorted(path.parent.name for path in OVERLAYS.glob("*/kustomization.yaml"))


def folder_of(name: str, parser: argparse.ArgumentParser) -> Path:
    """Of an overlay that is named, or a folder. Ends with 2 where there is neither."""
    for folder in (OVERLAYS / name, Path(name)):
        if folder.is_dir():
            return folder
    parser.error(f"--overlay {name}: neither an overlay ({', '.join(overlays())}) nor a folder")


def main(arguments: list[str] | None = None) -> int:
    """Check, print, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlay", action="append", help="only this one: a name in deploy/k8s/overlays, or a folder")
    parser.add_argument("--json", action="store_true", help="one JSON line an overlay")
    asked = parser.parse_args(arguments)
    wrong = 0
    for name in asked.overlay or overlays():
        folder = folder_of(name, parser)
        try:
            overlay = build(folder)
        except CannotBuild as error:
            print(f"{name}: kustomize does not build it: {error}", file=sys.stderr)
            wrong += 1
            continue
        found = list(problems(overlay))
        wrong += len(found)
        if asked.json:
            print(
                json.dumps(
                    {
                        "overlay": name,
                        "objects": len(overlay.objects),
                        "problems": [dataclasses.asdict(p) for p in found],
                    }
                )
            )
        else:
            print(f"{name}: {len(overlay.objects)} objects, {len(found) or 'no'} problems")
            for problem in found:
                print(f"  {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
