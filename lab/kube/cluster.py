"""A cluster, as far as we ask it for something: what `verify` needs, and kubectl doing it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from lab.kube.overlay import kubectl

Data = Mapping[str, Any]
CALL_WITHIN_S = 60.0
MANAGER = "loanmesh-verify"


class Refused(Exception):
    """The cluster, or kubectl before it, said no; the text is theirs."""


class Unreachable(Refused):
    """There is no such cluster, or it does not answer."""


class Cluster(Protocol):
    """What can be asked of a cluster. Everything raises Refused."""

    async def version(self) -> str:
        """Of the API server, e.g. v1.37.2. Raises Unreachable."""

    async def kinds(self) -> set[tuple[str, str]]:
        """(apiVersion, kind) that it takes."""

    async def get(self, kind: str, name: str, namespace: str = "") -> Data | None:
        """One object, or None."""

    async def all(self, kind: str, namespace: str = "") -> list[Data]:
        """All objects of a kind."""

    async def apply(self, objects: Sequence[Data], *, dry: bool = False) -> None:
        """Create or change objects; `dry`: only say whether it would."""

    async def delete(self, kind: str, name: str, within_s: float) -> None:
        """Delete, and wait until it is gone. What is not there is fine."""

    async def scale(self, deployment: str, namespace: str, replicas: int) -> None:
        """Set the number of replicas."""

    async def restart(self, deployment: str, namespace: str) -> None:
        """Replace all its pods, as a release does."""

    async def drain(self, node: str, within_s: float) -> None:
        """Let nothing new onto a node and evict what is there, as budgets allow."""

    async def uncordon(self, node: str) -> None:
        """Let pods onto a node again."""

    def watch(self, kind: str, namespace: str) -> AsyncGenerator[tuple[str, Data], None]:
        """What there is (ADDED), then every change (ADDED, MODIFIED, DELETED) until closed."""


class Kubectl:
    """A cluster that kubectl reaches.

    context, kubeconfig  as for kubectl; empty for its own choice.
    """

    def __init__(self, context: str = "", kubeconfig: str = "") -> None:
        self._command = [kubectl()]
        self._command += [f"--context={context}"] if context else []
        self._command += [f"--kubeconfig={kubeconfig}"] if kubeconfig else []

    async def version(self) -> str:
        try:
            return str(json.loads(await self._run("version", "-o", "json"))["serverVersion"]["gitVersion"])
        except Refused as error:
            contexts = await self._contexts()
            known = f"the kubeconfig knows {', '.join(contexts)}" if contexts else "the kubeconfig knows no context"
            raise Unreachable(
                f"{error}; {known}; name one: make kube-verify CONTEXT=NAME, or --context NAME"
            ) from error

    async def _contexts(self) -> list[str]:
        try:
            return (await self._run("config", "get-contexts", "-o", "name")).split()
        except Refused:
            return []  # Its file is not there either, as the first complaint says.

    async def kinds(self) -> set[tuple[str, str]]:
        found = set()
        for line in (await self._run("api-resources", "--no-headers")).splitlines():
            # NAME [SHORTNAMES] APIVERSION NAMESPACED KIND
            words = line.split()
            found.add((words[-3], words[-1]))
        return found

    async def get(self, kind: str, name: str, namespace: str = "") -> Data | None:
        text = await self._run("get", kind, name, *_in(namespace), "--ignore-not-found", "-o", "json")
        found: Data | None = json.loads(text) if text.strip() else None
        return found

    async def all(self, kind: str, namespace: str = "") -> list[Data]:
        items: list[Data] = json.loads(await self._run("get", kind, *_in(namespace), "-o", "json"))["items"]
        return items

    async def apply(self, objects: Sequence[Data], *, dry: bool = False) -> None:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})
        words = ["apply", "--server-side", f"--field-manager={MANAGER}", *(["--dry-run=server"] if dry else [])]
        await self._run(*words, "-f", "-", stdin=text)

    async def delete(self, kind: str, name: str, within_s: float) -> None:
        words = ["delete", kind, name, "--ignore-not-found", f"--timeout={int(within_s)}s"]
        await self._run(*words, within_s=within_s + CALL_WITHIN_S)

    async def scale(self, deployment: str, namespace: str, replicas: int) -> None:
        await self._run("scale", "deployment", deployment, *_in(namespace), f"--replicas={replicas}")

    async def restart(self, deployment: str, namespace: str) -> None:
        await self._run("rollout", "restart", "deployment", deployment, *_in(namespace))

    async def drain(self, node: str, within_s: float) -> None:
        words = ["drain", node, "--ignore-daemonsets", "--delete-emptydir-data", f"--timeout={int(within_s)}s"]
        await self._run(*words, within_s=within_s + CALL_WITHIN_S)

    async def uncordon(self, node: str) -> None:
        await self._run("uncordon", node)

    async def watch(self, kind: str, namespace: str) -> AsyncGenerator[tuple[str, Data], None]:
        words = [*self._command, "get", kind, *_in(namespace), "--watch", "--output-watch-events", "-o", "json"]
        process = await asyncio.create_subprocess_exec(
            *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert process.stdout
        decoder, text = json.JSONDecoder(), ""
        try:
            while chunk := await process.stdout.read(65536):
                text += chunk.decode()
                while text.lstrip():
                    try:
                        event, end = decoder.raw_decode(text.lstrip())
                    except ValueError:
                        break  # The rest of it is still to come.
                    text = text.lstrip()[end:]
                    yield event["type"], event["object"]
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _run(self, *words: str, stdin: str | None = None, within_s: float = CALL_WITHIN_S) -> str:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            *words,
            stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            out, error = await asyncio.wait_for(process.communicate(stdin.encode() if stdin else None), within_s)
        except TimeoutError:
            raise Refused(f"kubectl {words[0]}: no answer within {within_s:g} s") from None
        finally:
            # Whoever is interrupted leaves no kubectl behind that goes on changing the cluster.
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode:
            raise Refused(f"kubectl {words[0]}: {error.decode().strip()[-2000:]}")
        return out.decode()


def _in(namespace: str) -> list[str]:
    return [f"--namespace={namespace}"] if namespace else []
