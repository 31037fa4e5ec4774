"""The image, built and tried: the four services start from it as the manifests say, and decide an application.

    python -m lab.kube.image [--base IMAGE] [--tag TAG] [--json]

Needs podman. Containers use this machine's loopback, where a PostgreSQL of the laboratory and the sandbox's image stand
in for what a cluster has. Ends with 0 where all held, with 1 where something did not or could not be tried at all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import grpc
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from lending.intake.v1 import intake_service_pb2 as pb

from lab.kube.cluster import Refused
from lab.kube.container import Podman, flags
from lab.kube.overlay import OVERLAYS, Overlay, Workload, build
from lab.kube.report import Report, summed_up
from lab.kube.trial import certificate, certs, keys_of
from lab.population import Population
from lab.postgres import Postgres
from loanmesh.client import Client, Security
from loanmesh.client.results import Decided
from loanmesh.runtime.clock import Clock, SystemClock

ROOT = OVERLAYS.parents[2]
BASE = "docker.io/library/python:3.13-slim"
TLS = "/var/run/loanmesh/tls"
KEYS = "/var/run/loanmesh/keys"
READY_WITHIN_S = 60.0
INTERRUPTED = 130
DECIDED_WITHIN_S = 30.0
ORDER = ("bureau", "scoring", "pricing", "intake-worker", "intake")
"""As they are started; intake last, when there is somebody to ask."""


class Stage:
    """Where the services run: ports, addresses, files, and the containers so far."""

    def __init__(self, podman: Podman, overlay: Overlay, tag: str, folder: Path, clock: Clock) -> None:
        self.podman, self.overlay, self.folder, self.clock = podman, overlay, folder, clock
        self.image, self.sandbox_image = f"localhost/loanmesh:{tag}", f"localhost/loanmesh-sandbox:{tag}"
        self.prefix = f"loanmesh-trial-{os.getpid()}"
        self.ports = _free_ports([*ORDER, *(f"{name} health" for name in ORDER), "sandbox"])
        self.databases: dict[str, str] = {}
        self.started: list[str] = []

    def workload(self, kind: str, name: str) -> Workload:
        """Of the overlay."""
        found = self.overlay.find(kind, name)
        assert found, f"{kind} {name} is part of the overlay"
        return Workload(found)

    def container(self, name: str) -> str:
        """The container's name."""
        return f"{self.prefix}-{name}"

    def options(self, workload: Workload) -> list[str]:
        """As the manifest says; addresses are this machine's."""
        environment = {name: str(entry["value"]) for name, entry in workload.env.items() if "value" in entry}
        environment |= self._here(workload)
        names = [f"--add-host={name}:127.0.0.1" for name in ("bureau", "scoring", "pricing")]
        mounts = [f"--volume={self.folder}/services/{workload.service}:{TLS}:ro"] if workload.serves else []
        if (self.folder / "keys" / workload.service).exists() and workload.serves:
            mounts.append(f"--volume={self.folder}/keys/{workload.service}:{KEYS}:ro")
        return [
            "--network=host",
            *names,
            *mounts,
            *flags(workload),
            *(f"--env={name}={value}" for name, value in environment.items() if "$(" not in value),
        ]

    def _here(self, workload: Workload) -> dict[str, str]:
        """Settings that name addresses and secrets: those of this machine in place of the cluster's."""
        prefix = workload.service.upper()
        here = {}
        if workload.serves:
            here[f"{prefix}_SERVER__LISTEN"] = f"127.0.0.1:{self.ports[workload.name]}"
            here[f"{prefix}_SERVER__HEALTH_LISTEN"] = f"127.0.0.1:{self.ports[f'{workload.name} health']}"
        for name, entry in workload.env.items():
            reference = (entry.get("valueFrom") or {}).get("secretKeyRef")
            if reference:
                here[name] = self.databases[workload.service] if name.endswith("DATABASE_URL") else "for-trials-only"
        if workload.service == "intake" and workload.serves:
            here |= {f"INTAKE_{to.upper()}": f"dns:///{to}:{self.ports[to]}" for to in ("bureau", "scoring", "pricing")}
        if workload.service == "bureau" and workload.serves:
            here["BUREAU_SOURCES_URL"] = f"http://127.0.0.1:{self.ports['sandbox']}"
        return here

    async def start(self, workload: Workload, image: str, options: Sequence[str]) -> None:
        """Start one and remember it."""
        name = self.container(workload.name)
        self.started.append(name)
        await self.podman.start(name, image, options, workload.words)

    async def answers(self, name: str, port: int) -> None:
        """Wait until somebody listens; raises Refused with its last words."""
        give_up = self.clock.monotonic() + READY_WITHIN_S
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            state = (await self.podman.facts("container", self.container(name)))["State"]
            if not state["Running"] or self.clock.monotonic() > give_up:
                raise Refused(f"{name} does not serve: {(await self.podman.logs(self.container(name))).strip()[-800:]}")
            await self.clock.sleep(0.2)

    async def clean_up(self) -> None:
        """Remove what was started."""
        for name in self.started:
            await self.podman.remove(name)


class Door:
    """A way from loopback to a PostgreSQL that listens on a socket file, which other users cannot reach."""

    def __init__(self) -> None:
        self._servers: list[asyncio.Server] = []

    async def open(self, url: str) -> str:
        """The address of the same database, over TCP."""
        parts = urlsplit(url)
        socket_file = f"{parse_qs(parts.query)['host'][0]}/.s.PGSQL.5432"

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, onward = await asyncio.open_unix_connection(socket_file)
            with contextlib.suppress(OSError):
                await asyncio.gather(_pump(reader, onward), _pump(there, writer))

        self._servers.append(await asyncio.start_server(serve, "127.0.0.1", 0))
        port = self._servers[-1].sockets[0].getsockname()[1]
        return f"postgresql://postgres@127.0.0.1:{port}{parts.path}"

    async def close(self) -> None:
        """Let nobody in any more."""
        for server in self._servers:
            server.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(65536):
            writer.write(piece)
            await writer.drain()
    finally:
        writer.close()


async def run(report: Report, base: str, tag: str, clock: Clock) -> None:
    """All steps."""
    podman = Podman()
    if not podman.is_here():
        report.failed("podman", "is not installed (apt-get install podman): nothing was built or started")
        return
    overlay = build(OVERLAYS / "local")
    with tempfile.TemporaryDirectory(prefix="loanmesh-image-") as text:
        stage = Stage(podman, overlay, tag, Path(text), clock)
        postgres, door = Postgres(stage.folder / "postgres"), Door()
        try:
            await _build(report, stage, base)
            await _looked_at(report, stage)
            report.ok("runtime", f"containers start with: {await podman.find_way(stage.image)}")
            for service in ("intake", "bureau", "scoring", "pricing"):
                await certificate(service, overlay, stage.folder)
            for service in ("intake", "bureau"):
                keys_of(service, stage.folder, clock.now())
            await certs("issue", "client", "local", "--dir", str(stage.folder))
            _readable(stage.folder)
            await postgres.start()
            stage.databases = {
                name: await door.open(await postgres.new_database(name)) for name in ("intake", "bureau")
            }
            await _migrated(report, stage)
            await _started(report, stage)
            await _decided(report, stage)
            await _small(report, stage)
            await _ended(report, stage)
        except Refused as error:
            report.failed("trial", str(error))
        finally:
            await stage.clean_up()
            await door.close()
            await postgres.stop()


async def _build(report: Report, stage: Stage, base: str) -> None:
    for target, image in (("service", stage.image), ("sandbox", stage.sandbox_image)):
        report.progress(f"building {image} on {base}")
        how = await stage.podman.build(str(ROOT), base, target, image, {"REVISION": await _revision()})
        size = (await stage.podman.facts("image", image))["Size"] / 2**20
        report.ok("build", f"{image} on {base}, {size:.0f} MiB; {how}")


async def _revision() -> str:
    process = await asyncio.create_subprocess_exec(
        "git", "rev-parse", "HEAD", cwd=ROOT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    return out.decode().strip() or "unknown"


async def _looked_at(report: Report, stage: Stage) -> None:
    """What the image says of itself."""
    config = (await stage.podman.facts("image", stage.image))["Config"]
    wrong = []
    if not config.get("User", "").split(":")[0].isdigit():
        wrong.append(f"its user is {config.get('User')!r}, not a number")
    if config.get("Entrypoint") != ["loanmesh"]:
        wrong.append(f"it begins with {config.get('Entrypoint')}, not with the command itself")
    labels = config.get("Labels") or {}
    wrong += [
        f"no label {name}"
        for name in ("title", "version", "revision")
        if f"org.opencontainers.image.{name}" not in labels
    ]
    report.judge("image", wrong, f"user {config['User']}, process 1 is loanmesh, OCI labels are there")


def _readable(folder: Path) -> None:
    """Let the containers' user read certificates and keys; the folder around them keeps others of this machine out."""
    for name in ("services", "keys"):
        for path in (folder / name, *(folder / name).rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o444)


async def _migrated(report: Report, stage: Stage) -> None:
    for service in ("intake", "bureau"):
        job = stage.workload("Job", f"{service}-migrate")
        await stage.podman.run_to_end(stage.image, stage.options(job), job.words)
    report.ok("migrate", "the tables of intake and bureau, as their Jobs do")


async def _started(report: Report, stage: Stage) -> None:
    sandbox = stage.workload("Deployment", "sandbox")
    words = ["--port", str(stage.ports["sandbox"]), "--state", "/tmp/state"]
    stage.started.append(stage.container("sandbox"))
    options = ["--network=host", *flags(sandbox)]
    await stage.podman.start(stage.container("sandbox"), stage.sandbox_image, options, words)
    await stage.answers("sandbox", stage.ports["sandbox"])
    wrong = []
    for name in ORDER:
        workload = stage.workload("Deployment", name)
        await stage.start(workload, stage.image, stage.options(workload))
        await stage.answers(name, stage.ports[f"{name} health"])
        wrong += [f"{name}: {text}" for text in await _unwell(workload, stage.ports[f"{name} health"])]
        wrong += [f"{name}: {text}" for text in await _not_as_said(stage, workload)]
    report.judge(
        "start", wrong, f"{', '.join(ORDER)}: probes, process 1, user, read-only root and limits as in the manifests"
    )


_LOOK = """
import importlib.util, json, os
def writes(path):
    try:
        open(path, 'w').close(); os.unlink(path); return True
    except OSError:
        return False
print(json.dumps({
    'uid': os.getuid(), 'first': open('/proc/1/cmdline').read().replace(chr(0), ' '),
    'root': writes('/x'), 'home': writes('/opt/loanmesh/x'), 'tmp': writes('/tmp/x'),
    'lab': importlib.util.find_spec('lab') is not None, 'pip': importlib.util.find_spec('pip') is not None,
    'capabilities': [l for l in open('/proc/self/status') if l.startswith('CapEff')][0].split()[1],
}))
"""


async def _unwell(workload: Workload, port: int) -> list[str]:
    """What the manifest's probes find, asked as the kubelet does: by gRPC, without TLS."""
    wrong = []
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            request = health_pb2.HealthCheckRequest(service=workload.main[probe]["grpc"]["service"])
            answer = await health.Check(request, timeout=5, wait_for_ready=True)
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                wrong.append(f"{probe} finds {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")
    return wrong


async def _not_as_said(stage: Stage, workload: Workload) -> list[str]:
    """Where a container is not what its manifest says."""
    name = stage.container(workload.name)
    seen = json.loads(await stage.podman.inside(name, _LOOK))
    limits = (await stage.podman.facts("container", name))["HostConfig"]
    expected: Mapping[str, object] = {
        "uid": workload.pod["securityContext"]["runAsUser"], "root": False, "home": False, "tmp": True, "lab": False,
        "pip": False, "capabilities": "0" * 16,
    }  # fmt: skip
    wrong = [f"{key} is {seen[key]}, not {value}" for key, value in expected.items() if seen[key] != value]
    if f"loanmesh {' '.join(workload.words)}" not in seen["first"]:
        wrong.append(f"process 1 is {seen['first']!r}")
    if not limits.get("Memory") or not limits.get("NanoCpus"):
        wrong.append("has no limits of memory and cores")
    return wrong


async def _decided(report: Report, stage: Stage) -> None:
    application = Population().application("person", 7, stage.clock.now())
    security = Security.in_folder(stage.folder / "clients" / "local")
    async with Client(f"localhost:{stage.ports['intake']}", security=security) as client:
        began = stage.clock.monotonic()
        outcome = await client.submit_and_wait(
            json_format.ParseDict(application, pb.Application()), deadline_s=DECIDED_WITHIN_S
        )
        took_s = stage.clock.monotonic() - began
    if isinstance(outcome, Decided):
        report.ok(
            "decide",
            f"an application was accepted by intake and decided by intake-worker, over mTLS, in {took_s:.2f} s",
        )
    else:
        report.failed("decide", f"an application is {outcome} after {took_s:.0f} s")


_PEAK = "print([line for line in open('/proc/1/status') if line.startswith('VmHWM')][0].split()[1])"
"""Prints how much memory process 1 had at most, KiB."""


async def _small(report: Report, stage: Stage) -> None:
    """Memory after an application, beside what the manifest allows: traffic needs the other half."""
    wrong, said = [], []
    for name in ORDER:
        peak_mib = int(await stage.podman.inside(stage.container(name), _PEAK)) / 2**10
        limit_mib = (await stage.podman.facts("container", stage.container(name)))["HostConfig"]["Memory"] / 2**20
        said.append(f"{name} {peak_mib:.0f} of {limit_mib:.0f}")
        if peak_mib > limit_mib / 2:
            wrong.append(f"{name} has {peak_mib:.0f} MiB of {limit_mib:.0f} before there is any traffic")
    report.judge("memory", wrong, f"at most, MiB: {', '.join(said)}")


async def _ended(report: Report, stage: Stage) -> None:
    """SIGTERM reaches the service, which leaves in good order within its grace."""
    wrong, took = [], {}
    for name in reversed(ORDER):
        grace_s = int(stage.workload("Deployment", name).pod["terminationGracePeriodSeconds"])
        began = stage.clock.monotonic()
        await stage.podman.stop(stage.container(name), grace_s)
        took[name] = stage.clock.monotonic() - began
        code = (await stage.podman.facts("container", stage.container(name)))["State"]["ExitCode"]
        if code:
            wrong.append(f"{name} ended with {code} after {took[name]:.0f} s of {grace_s} s")
    said = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in took.items())
    report.judge("end", wrong, f"SIGTERM, and all ended with 0 within their grace: {said}")


def _free_ports(names: Sequence[str]) -> dict[str, int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in names]
    ports = {name: one.getsockname()[1] for name, one in zip(names, held, strict=True)}
    for one in held:
        one.close()
    return ports


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, try, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=BASE, help=f"image to build on, with Python 3.11 or newer; {BASE}")
    parser.add_argument("--tag", default="dev", help="tag of what is built")
    parser.add_argument("--json", action="store_true", help="one JSON document in the end")
    asked = parser.parse_args(arguments)
    report = Report(quiet=asked.json)
    try:
        asyncio.run(run(report, asked.base, asked.tag, SystemClock()))
    except KeyboardInterrupt:
        return INTERRUPTED
    summed_up(report, "image", asked.json)
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
