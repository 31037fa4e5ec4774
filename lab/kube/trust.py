"""Who is let in, and who is believed: clients by a table of the overlay, databases by a CA. Trials may do without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lab.kube.code import BadTable, lenders_of, lets
from lab.kube.overlay import Overlay, Problem, Workload

FOR_TRIALS = "loanmesh.dev/for-trials"
"""Annotation of the Namespace: "true" where everybody may know the passwords. What does not say so is production."""
TABLE = "INTAKE_ACCESS__TABLE_FILE"
TRIAL_CLIENT = "client/local"
"""The one client of the table that is shipped."""
VERIFIED = "verify-full"


def check(overlay: Overlay) -> Iterator[Problem]:
    """Clients of intake, and databases of everybody."""
    if any(found.annotations.get(FOR_TRIALS) == "true" for found in overlay.of("Namespace")):
        return
    for workload in overlay.workloads:
        if workload.serves and workload.service == "intake":
            yield from _clients(overlay, workload)
        if f"{workload.service.upper()}_DATABASE_URL" in workload.env:
            yield from _database(overlay, workload)


def _clients(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    at, file = f"env {TABLE}", workload.value(TABLE)
    if not file:
        yield workload.wrong(at, f"must name a table of clients: the shipped one knows {TRIAL_CLIENT} alone")
        return
    text = _text(overlay, workload, file)
    if text is None:
        yield workload.wrong(at, f"is {file}, which is in no ConfigMap of the overlay")
        return
    try:
        lenders = lenders_of(text, file)
    except BadTable as error:
        yield workload.wrong(at, str(error))
        return
    clients = [pattern for pattern, acts_for in lenders.items() if pattern.startswith("client/") and acts_for]
    if not clients:
        yield workload.wrong(at, f"{file} lets no client act for a lender")
    for pattern in clients:
        if lets(pattern, TRIAL_CLIENT):
            yield workload.wrong(at, f"{file}: {pattern} lets in {TRIAL_CLIENT}, which is for trials")


def _database(overlay: Overlay, workload: Workload) -> Iterator[Problem]:
    mode, root = workload.value("PGSSLMODE"), workload.value("PGSSLROOTCERT")
    if mode != VERIFIED:
        yield workload.wrong("env PGSSLMODE", f"is {mode!r}; must be {VERIFIED}: else anybody may be the database")
    volume, key = _volume(workload, root)
    secret = (volume.get("secret") or {}) if volume else {}
    shown = [str(item["key"]) for item in secret.get("items") or ()]
    if not secret or (overlay.of("Cluster") and shown != [key]):
        # CloudNativePG keeps the CA's key in the same Secret.
        yield workload.wrong("env PGSSLROOTCERT", f"is {root!r}; must be in a Secret that brings this file alone")


def _text(overlay: Overlay, workload: Workload, file: str) -> str | None:
    """What a file of the pod holds, where a ConfigMap of the overlay brings it."""
    volume, key = _volume(workload, file)
    found = overlay.find("ConfigMap", str((volume.get("configMap") or {}).get("name"))) if volume else None
    text = (found.data.get("data") or {}).get(key) if found else None
    return None if text is None else str(text)


def _volume(workload: Workload, file: str) -> tuple[Mapping[str, Any] | None, str]:
    """The volume that brings a file, and the file's name in it."""
    folder, _, name = file.rpartition("/")
    mounted = [str(m["name"]) for m in workload.main.get("volumeMounts") or () if str(m["mountPath"]) == folder]
    volumes = [volume for volume in workload.pod.get("volumes") or () if volume["name"] in mounted]
    return (volumes[0] if volumes else None), name
