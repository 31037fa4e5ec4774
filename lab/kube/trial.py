"""Secrets for a trial, in place of those that people or operators make: certificates, keys, addresses."""

from __future__ import annotations

import asyncio
import datetime as dt
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.kube.cluster import Data, Refused
from lab.kube.overlay import Overlay, Workload
from loanmesh.runtime.keys import new_ring, write_ring

CA = "ca.crt"
FILES = (CA, "tls.crt", "tls.key")
SUFFIX = "-tls"
KEYS = "-keys"
KEYS_FILE = "keys.json"
"""What privacy's settings name, in the Secret SERVICE-keys."""


def missing(overlay: Overlay, left_out: Sequence[str]) -> dict[str, set[str]]:
    """Names of Secrets that pods ask for and nobody makes, with the keys that are asked for.

    left_out  kinds that the cluster does not know, so that their operators make nothing.
    """
    made = {found.name for found in overlay.of("Secret")}
    if "Certificate" not in left_out:
        made |= {str(found.spec["secretName"]) for found in overlay.of("Certificate")}
    if "Cluster" not in left_out:
        made |= {f"{found.name}-{what}" for found in overlay.of("Cluster") for what in ("app", "ca")}
    wanted: dict[str, set[str]] = {}
    for workload in overlay.workloads:
        for name, key in _asked(workload):
            if name not in made:
                wanted.setdefault(name, set()).add(key)
    return wanted


def _asked(workload: Workload) -> Iterator[tuple[str, str]]:
    for entry in workload.env.values():
        reference = (entry.get("valueFrom") or {}).get("secretKeyRef")
        if reference:
            yield reference["name"], reference["key"]
    for volume in workload.pod.get("volumes") or ():
        if "secret" in volume:
            name = volume["secret"]["secretName"]
            named = [str(item["key"]) for item in volume["secret"].get("items") or ()]
            for key in named or (FILES if name.endswith(SUFFIX) else (KEYS_FILE,)):
                yield name, key


async def secrets(
    wanted: dict[str, set[str]], overlay: Overlay, namespace: str, folder: Path, now: dt.datetime
) -> list[Data]:
    """Secrets of those names: certificates of a CA that is made in `folder`, and words that open nothing."""
    made: list[Data] = []
    for name, keys in sorted(wanted.items()):
        if keys == {CA}:
            values = {CA: await authority(folder)}
        elif keys & set(FILES):
            values = await certificate(name.removesuffix(SUFFIX), overlay, folder)
        elif keys == {KEYS_FILE}:
            values = {KEYS_FILE: keys_of(name.removesuffix(KEYS), folder, now)}
        else:
            values = {key: _word(key) for key in keys}
        metadata = {"name": name, "namespace": namespace}
        made.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "Opaque", "stringData": values}
        )
    return made


def _word(key: str) -> str:
    return "postgresql://nobody:trial@database.invalid/none" if key in ("uri", "url") else "for-trials-only"


async def authority(folder: Path) -> str:
    """The CA in `folder`, made where there is none."""
    if not (folder / CA).exists():
        await certs("init", "--dir", str(folder))
    return (folder / CA).read_text(encoding="ascii")


async def certificate(service: str, overlay: Overlay, folder: Path) -> dict[str, str]:
    """Issued to the service in `folder`, for all the Services in front of the Deployments that run it; by file."""
    await authority(folder)
    names = sorted({workload.name for workload in overlay.services() if workload.service == service} | {service})
    dns = [word for name in names for word in ("--dns", name)]
    await certs("issue", "service", service, "--dir", str(folder), *dns)
    return {file: (folder / "services" / service / file).read_text(encoding="ascii") for file in FILES}


def keys_of(service: str, folder: Path, now: dt.datetime) -> str:
    """Keys for its personal data, new ones, in `folder`/keys/SERVICE/keys.json."""
    path = folder / "keys" / service / KEYS_FILE
    write_ring(path, new_ring(now), new=True)
    return path.read_text(encoding="utf-8")


async def certs(*words: str) -> None:
    """`loanmesh certs`. Raises Refused."""
    # The command, since the laboratory knows the mesh from outside.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "loanmesh", "certs", *words,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, error = await process.communicate()
    if process.returncode:
        raise Refused(f"loanmesh certs {words[0]}: {error.decode().strip()}")
