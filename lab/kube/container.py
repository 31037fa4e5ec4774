"""Podman, and how a pod of the manifests is started by it: same user, same limits, same read-only root."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from lab.kube.cluster import Refused
from lab.kube.overlay import Workload, cores

_BYTES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
BUILD_WITHIN_S = 1800.0
CALL_WITHIN_S = 120.0
# As a machine gives it: some allow no more open files than they have, others only the older runtime.
WAYS: tuple[tuple[Sequence[str], Sequence[str]], ...] = tuple(
    (runtime, limits)
    for runtime in ((), ("--runtime=runc",))
    for limits in ((), ("--ulimit=nofile=1024:1024", "--ulimit=nproc=1024:1024"))
)


def flags(workload: Workload) -> list[str]:
    """What its manifest says of the pod, as podman's options."""
    both = {**(workload.pod.get("securityContext") or {}), **(workload.main.get("securityContext") or {})}
    limits = workload.main["resources"]["limits"]
    found = [f"--user={both['runAsUser']}:{both['runAsGroup']}", f"--cpus={cores(limits['cpu'])}"]
    found.append(f"--memory={_bytes(limits['memory'])}")
    found += ["--read-only", "--read-only-tmpfs=false"] if both.get("readOnlyRootFilesystem") else []
    found += ["--security-opt=no-new-privileges"] if both.get("allowPrivilegeEscalation") is False else []
    found += [f"--cap-drop={name}" for name in both.get("capabilities", {}).get("drop") or ()]
    empty = {v["name"]: v["emptyDir"] for v in workload.pod.get("volumes") or () if "emptyDir" in v}
    for mount in workload.main.get("volumeMounts") or ():
        if mount["name"] in empty:
            size = _bytes(empty[mount["name"]].get("sizeLimit", "64Mi"))
            found.append(f"--tmpfs={mount['mountPath']}:rw,size={size},mode=1777")
    return found


def _bytes(text: str) -> int:
    return int(text[:-2]) * _BYTES[text[-2:]] if text[-2:] in _BYTES else int(text)


class Podman:
    """Builds images and runs containers."""

    def __init__(self) -> None:
        self._runtime: Sequence[str] = ()
        self._limits: Sequence[str] = ()

    @staticmethod
    def is_here() -> bool:
        """Whether the program is installed."""
        return shutil.which("podman") is not None

    async def build(self, folder: str, base: str, target: str, tag: str, labels: Mapping[str, str]) -> str:
        """Build a target; how it was isolated, in words."""
        words = [
            "build",
            "--layers",
            "--network=host",
            "--file=deploy/Containerfile",
            f"--target={target}",
            f"--tag={tag}",
        ]
        words += ["--ignorefile=deploy/Containerfile.containerignore"]
        words += [f"--build-arg={name}={value}" for name, value in {"BASE": base, **labels}.items() if value]
        try:
            await self._run(*words, folder, within_s=BUILD_WITHIN_S)
            return "each step in a container"
        except Refused as first:
            try:
                await self._run(*words, "--isolation=chroot", folder, within_s=BUILD_WITHIN_S)
            except Refused as second:
                raise Refused(f"{first}\nand with --isolation=chroot: {second}") from second
            return "each step in a chroot, since this machine runs no containers while it builds"

    async def find_way(self, image: str) -> str:
        """Find out how containers start on this machine; raises Refused where they do not."""
        errors = []
        for self._runtime, self._limits in WAYS:
            try:
                await self._run(*self._runtime, "run", "--rm", *self._limits, "--network=none", image, "--version")
                return " ".join([*self._runtime, *self._limits]) or "podman's defaults"
            except Refused as error:
                errors.append(str(error).splitlines()[-1])
        raise Refused("; ".join(dict.fromkeys(errors)))

    async def start(self, name: str, image: str, options: Sequence[str], words: Sequence[str]) -> None:
        """Start a container in the background."""
        await self._run(*self._runtime, "run", "--detach", f"--name={name}", *self._limits, *options, image, *words)

    async def run_to_end(self, image: str, options: Sequence[str], words: Sequence[str]) -> str:
        """Run one until it ends by itself; what it printed."""
        return await self._run(*self._runtime, "run", "--rm", *self._limits, *options, image, *words)

    async def inside(self, name: str, code: str) -> str:
        """Run a line of Python in a container; what it printed."""
        return (await self._run(*self._runtime, "exec", name, "python", "-c", code)).strip()

    async def facts(self, kind: str, name: str) -> Mapping[str, Any]:
        """What podman knows of an image or a container."""
        found: Mapping[str, Any] = json.loads(await self._run(kind, "inspect", name))[0]
        return found

    async def stop(self, name: str, within_s: int) -> None:
        """SIGTERM, and SIGKILL after so many seconds."""
        await self._run("stop", f"--time={within_s}", name, within_s=within_s + CALL_WITHIN_S)

    async def logs(self, name: str) -> str:
        """The last lines that it wrote."""
        return await self._run("logs", "--tail=20", name)

    async def remove(self, name: str) -> None:
        """Whether it runs, or is there, or not."""
        await self._run("rm", "--force", "--ignore", name)

    async def _run(self, *words: str, within_s: float = CALL_WITHIN_S) -> str:
        process = await asyncio.create_subprocess_exec(
            "podman", *words,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        try:
            out, _ = await asyncio.wait_for(process.communicate(), within_s)
        except TimeoutError:
            raise Refused(f"podman {words[0]}: not done within {within_s:g} s") from None
        finally:
            # Whoever is interrupted leaves no podman behind that goes on building.
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise Refused(f"podman {' '.join(words[:2])}: {out.decode(errors='replace').strip()[-1500:]}")
        return out.decode(errors="replace")
