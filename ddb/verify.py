"""`ddb verify`: whether what clients see of a living cluster is linearizable.

Laws:

1. What counts is what clients saw: requests and replies on real connections, and one clock. An operation whose client
   doesn't know what came of it stays unknown, and is never asked again.
2. The cluster's own data is not touched. All keys are under a scratch prefix that nobody used before, and they are
   removed at the end, however it ends. (A write of unknown outcome that waits in a frozen server may come after that.)
3. "Linearizable" is said of what was judged, and how much that was is said too. What stood in the way of judging is a
   failure, never a pass.
4. Memory and time are bounded: a long run is judged in rounds, each with keys of its own.
5. The first Ctrl-C ends the load, and what was seen is judged; the second one ends that too.

Theory. What is wrong shows only where clients meet. So the keys in use are few (workload.py), and the clients ask in
step, on a grid of moments `clients / rate` apart, at any node. In the end every key is read once more, so that a write
that was acknowledged and lost has somebody to miss it. Reads that say they are stale are judged too: at a revision, a key has
one value, whoever tells it (revisions.py).

Each operation of unknown outcome may double what there is to try. So keys of which too much is unknown are retired, like
those that have been asked often enough, and fresh ones take their place.

With `faults` there is a cluster of its own, as `ddb up` starts it, in a temporary directory, and a nemesis (nemesis.py)
that harms a minority of it. It is the main thread that does so and that starts processes; the clients are threads, which only
talk.
"""

from __future__ import annotations

import contextlib
import random
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ddb import overview, up
from ddb.checker import check
from ddb.client import Client, connect
from ddb.errors import DdbError, Timeout, Unreachable, WrongCluster
from ddb.findings import Findings
from ddb.history import BadHistory, Operation, Outcome
from ddb.nemesis import Nemesis
from ddb.scratch import Interrupts, remove_all
from ddb.workload import KEYS_OF_FAMILY, MIX, Family, Fault, Request, Script

OPERATION_S: Final = 1.0
ROUND_OPERATIONS: Final = 20_000
FAMILY_OPERATIONS: Final = 300
FAMILY_UNKNOWN: Final = 3  # outcomes: each may double what there is to try
CLIENTS_OF_FAMILY: Final = 4
CONFIGURATIONS_MAX: Final = 50_000  # of one family: some seconds
LOOK_S: Final = 0.05
SILENCE_S: Final = 10.0
PATIENCE_S: Final = 5.0  # with a question on which everything depends
UNREACHABLE_S: Final = 1.0
RETURN_S: Final = 20.0  # for a node that was harmed to come back
MESSAGE_CHARACTERS_MAX: Final = 300
ANYWHERE: Final = 0.4  # of the requests go to any node, the rest where the client would go by itself
SHUNNED_S: Final = 1.5  # at most, for a node that did not answer a client: so that it has time for the others

Watch = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What `ddb verify` was told. `servers` are asked, unless there are `faults`: then a cluster of `nodes` of its own.

    `rate` is in operations a second, all clients together; `keys` is how many are in use at a time, rounded up to whole
    families (None: a family for every four clients, two at least); `seed` None draws one.
    """

    servers: tuple[str, ...]
    seconds: float = 10.0
    clients: int = 8
    keys: int | None = None
    rate: int = 1000
    mix: Mapping[str, int] = field(default_factory=lambda: MIX)
    timeout_s: float = OPERATION_S
    seed: int | None = None
    faults: tuple[Fault, ...] = ()
    nodes: int = up.NODES
    election: str | None = None

    @property
    def families(self) -> int:
        """How many are in use at a time."""
        if self.keys is None:
            return max(2, self.clients // CLIENTS_OF_FAMILY)
        return -(-self.keys // KEYS_OF_FAMILY)


def run(settings: Settings, watch: Watch) -> Findings:
    """Do all of it, and return what was found; `watch` gets a line on how far it is, several times a second.

    Raises Unreachable, NoLeader and the like where there is no cluster to ask, StartupError where none can be started,
    KeyboardInterrupt where Ctrl-C ended more than the load.
    """
    seed = secrets.randbelow(1 << 32) if settings.seed is None else settings.seed
    findings = Findings(seed, f"verify/{secrets.token_hex(4)}/")
    with Interrupts() as interrupts:
        if settings.faults:
            _with_own_cluster(settings, findings, interrupts, watch)
        else:
            addresses = _nodes_of(settings.servers)
            with _scratch(addresses, findings, interrupts):
                _Run(settings, addresses, findings, interrupts, watch).run()
    return findings


def _with_own_cluster(settings: Settings, findings: Findings, interrupts: Interrupts, watch: Watch) -> None:
    """Run against a cluster that is started for it. Its directory stays if it is evidence."""
    directory = Path(tempfile.mkdtemp(prefix="ddb-verify-"))
    wanted = up.Settings(directory, settings.nodes, port=0, election=settings.election, throwaway=True)
    keep = True
    try:
        watch(f"starting {settings.nodes} nodes")
        with up.cluster(wanted, lambda line: None) as (_, *nodes):
            nemesis = Nemesis(nodes, settings.faults, random.Random(f"{findings.seed}/nemesis"))
            addresses = [node.address for node in nodes]
            try:
                _Run(settings, addresses, findings, interrupts, watch, nemesis).run()
            finally:
                nemesis.release()
        keep = findings.refuted or bool(findings.trouble)
    except KeyboardInterrupt:
        keep = False
        raise
    finally:
        if keep:
            findings.directory = directory
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _nodes_of(servers: Sequence[str]) -> list[str]:
    """The addresses of the cluster's members that answer. Raises a DdbError where it can't serve, or isn't one."""
    with connect(servers, timeout_s=PATIENCE_S, unreachable_s=UNREACHABLE_S) as client:
        client.call({"op": "count", "prefix": "verify/"})
    cluster_of = {view.address: view.status.get("cluster") for view in overview.ask_all(servers) if view.status}
    clusters = set(filter(None, cluster_of.values()))
    if len(clusters) > 1:
        raise WrongCluster(f"{', '.join(servers)} are not of one cluster, so they know nothing of one another's data.")
    return [address for address, cluster in cluster_of.items() if cluster or not clusters] or list(servers)


# ---------------------------------------------------------------- one run


class _Run:
    """Rounds of load, each judged, until time is up or something is found."""

    def __init__(
        self,
        settings: Settings,
        addresses: list[str],
        findings: Findings,
        interrupts: Interrupts,
        watch: Watch,
        nemesis: Nemesis | None = None,
    ) -> None:
        self._settings = settings
        self._addresses = addresses
        self._findings = findings
        self._interrupts = interrupts
        self._watch = watch
        self._nemesis = nemesis
        self._keys = _Keys(settings.families)
        self._origin_s = time.monotonic()
        self._left_s = settings.seconds
        self._silent_s = 0.0
        self._clients = [
            _Asker(f"c{number}", self._clock, settings, addresses, findings, self._keys)
            for number in range(1, settings.clients + 1)
        ]

    def run(self) -> None:
        """All rounds; the findings say what came of them."""
        findings = self._findings
        with contextlib.ExitStack() as stack:
            for client in self._clients:
                stack.callback(client.close)
            try:
                while self._left_s > 0 and not self._interrupts.asked and findings.exit_code_so_far == 0:
                    self._round()
            except KeyboardInterrupt:
                stack.pop_all()  # to close a client is to wait for its request
                raise
        if self._nemesis is not None:
            findings.faults = Counter({fault.value: count for fault, count in self._nemesis.done.items()})

    def _round(self) -> None:
        """Load, a last look, and the verdict, with keys of its own."""
        self._keys.renew()
        with self._interrupts.noted():
            history = self._load()
            if self._left_s <= 0 or self._interrupts.asked or self._findings.trouble:
                self._heal()
            history += self._last_look()
        self._findings.count(history)
        self._judge(history)

    def _clock(self) -> float:
        return round(time.monotonic() - self._origin_s, 6)

    def _load(self) -> list[Operation]:
        """One round of load: all that the clients did. Ends early where there is no point in going on."""
        stopping = threading.Event()
        threads = [threading.Thread(target=client.work, args=(stopping,), daemon=True) for client in self._clients]
        began_s = looked_s = time.monotonic()
        end_s = began_s + self._left_s
        acknowledged = -1
        try:
            for thread in threads:
                thread.start()
            while looked_s < end_s and (working := next((thread for thread in threads if thread.is_alive()), None)):
                working.join(LOOK_S)
                now_s = time.monotonic()
                before, acknowledged = acknowledged, sum(client.acknowledged for client in self._clients)
                self._hearken(before != acknowledged, min(now_s - looked_s, 10 * LOOK_S))
                looked_s = now_s
                if self._interrupts.asked or self._findings.trouble or any(c.failure for c in self._clients):
                    break
                if self._nemesis is not None:
                    self._nemesis.tick()
                self._watch(self._progress(self._findings.seconds + looked_s - began_s))
        finally:
            stopping.set()
        took_s = time.monotonic() - began_s
        for thread in threads:
            thread.join()
        self._left_s -= took_s
        self._findings.seconds += took_s
        for client in self._clients:
            if client.failure is not None:
                raise client.failure
        return [operation for client in self._clients for operation in client.take()]

    def _hearken(self, heard: bool, passed_s: float) -> None:
        """Note how long the cluster has been silent: failures, and nothing else."""
        if self._nemesis is not None and self._nemesis.trouble:
            self._findings.fail(self._nemesis.trouble)
        errors = [client.error for client in self._clients if client.error is not None]
        if heard or not errors:
            self._silent_s = 0.0
            return
        self._silent_s += passed_s
        if self._silent_s >= SILENCE_S:
            self._findings.fail(
                f"The cluster acknowledged nothing for {SILENCE_S:g} s. The last failure: {errors[0].message}",
                Unreachable.exit_code,
            )

    def _progress(self, seconds: float) -> str:
        failed, unknown = (sum(getattr(client, name) for client in self._clients) for name in ("failed", "unknown"))
        done = sum(client.acknowledged for client in self._clients)
        nodes = f", {self._nemesis}" if self._nemesis is not None else ""
        return f"{seconds:.0f} s: {done:,} operations acknowledged, {failed:,} failed, {unknown:,} unknown{nodes}"

    def _heal(self) -> None:
        if self._nemesis is not None:
            self._watch("waiting until all nodes are back")
            if not self._nemesis.heal(RETURN_S):
                self._findings.fail(self._nemesis.trouble or f"Not all is well after {RETURN_S:g} s: {self._nemesis}.")

    def _last_look(self) -> list[Operation]:
        """Read each key of the round once more, each at another node; who doesn't answer isn't asked again."""
        self._watch("reading all keys once more")
        history: list[Operation] = []
        addresses = list(self._addresses)
        with connect(addresses, discover=False, timeout_s=self._settings.timeout_s) as client:
            for number, key in enumerate(key for family in self._keys.used for key in family.keys):
                request = {"op": "get", "key": self._findings.prefix + key}
                error: DdbError | None = Unreachable("Nobody was asked.")
                while error is not None and addresses:
                    at = addresses[number % len(addresses)]
                    operation, error = _ask(client, "end", request, at, self._clock)
                    history.append(operation)
                    if error is not None:
                        addresses.remove(at)
        return history

    def _judge(self, history: list[Operation]) -> None:
        self._watch(f"judging {len(history):,} operations")
        began_s = time.monotonic()
        try:
            verdict = check(history, configurations_max=CONFIGURATIONS_MAX)
        except BadHistory as error:
            self._findings.fail(f"The cluster answered what makes no sense: {error.message[:MESSAGE_CHARACTERS_MAX]}")
        else:
            self._findings.judge(verdict, time.monotonic() - began_s)


class _Asker:
    """One client: asks in step with the others, and keeps what it was told.

    Counts are for all rounds. `error` is what its last operation failed with, None where it was acknowledged; `failure`
    is an exception that should not have been.
    """

    def __init__(
        self,
        name: str,
        clock: Callable[[], float],
        settings: Settings,
        addresses: Sequence[str],
        findings: Findings,
        keys: _Keys,
    ) -> None:
        self._name = name
        self._clock = clock
        self._prefix = findings.prefix
        self._chance = random.Random(f"{findings.seed}/{name}")
        self._script = Script(name, settings.mix, self._chance)
        self._client = connect(list(addresses), discover=False, timeout_s=settings.timeout_s)
        self._addresses = addresses
        self._shunned_until = dict.fromkeys(addresses, 0.0)
        self._keys = keys
        self._step_s = settings.clients / settings.rate
        self._quota = -(-ROUND_OPERATIONS // settings.clients)
        self._history: list[Operation] = []
        self.acknowledged = self.failed = self.unknown = 0
        self.error: DdbError | None = None
        self.failure: BaseException | None = None

    def work(self, stopping: threading.Event) -> None:
        """One round, on a thread of its own."""
        try:
            for _ in range(self._quota):
                self._operation()
                moment_s = self._clock()
                if stopping.wait(self._step_s - moment_s % self._step_s):
                    return
        except BaseException as failure:  # told to the main thread, which raises it
            self.failure = failure

    def _operation(self) -> None:
        family = self._keys.pick(self._chance)
        short = self._script.next(family)
        request = _prefixed(short, self._prefix)
        at = self._place(request)
        operation, self.error = _ask(self._client, self._name, request, at, self._clock)
        self._history.append(operation)
        if at is not None and isinstance(self.error, Timeout | Unreachable):
            self._shunned_until[at] = self._clock() + self._chance.uniform(0, SHUNNED_S)
        if operation.outcome is Outcome.DONE:
            self.acknowledged += 1
            self._script.heard(short, operation.reply or {})
        elif operation.outcome is Outcome.NOT_DONE:
            self.failed += 1
        else:
            self.unknown += 1
            self._keys.blur(family)

    def _place(self, request: Request) -> str | None:
        """The node to ask; None: whichever the client asks by itself."""
        anywhere = self._chance.random() < ANYWHERE or request.get("read") == "stale"
        at = self._chance.choice(self._addresses)
        return at if anywhere and self._shunned_until[at] <= self._clock() else None

    def take(self) -> list[Operation]:
        """What it did since it was last asked."""
        history, self._history = self._history, []
        return history

    def close(self) -> None:
        """Close its connections."""
        self._client.close()


def _ask(
    client: Client, name: str, request: Request, at: str | None, clock: Callable[[], float]
) -> tuple[Operation, DdbError | None]:
    """One operation, and why it failed. Its request also says where it was asked, where that was told to the client."""
    asked = request if at is None else {**request, "at": at}
    called = clock()
    try:
        reply, error = client.call(request, at=at), None
    except DdbError as failure:
        reply, error = {"ok": False, "error": failure.code, "message": failure.message}, failure
    return Operation(name, asked, called, clock(), reply), error


def _prefixed(request: Request, prefix: str) -> Request:
    """The request, its keys under `prefix`."""
    whole: Request = {name: prefix + request[name] for name in ("key", "prefix") if name in request}
    for part in ("if", "then", "else", "ops"):
        if part in request:
            inner = request[part]
            whole[part] = [_prefixed(i, prefix) for i in inner] if isinstance(inner, list) else _prefixed(inner, prefix)
    return {**request, **whole}


class _Keys:
    """The families in use: `width` at a time, each replaced when it has served its time, or when too much about it is
    unknown. For all threads."""

    def __init__(self, width: int) -> None:
        self.used: list[Family] = []  # in this round
        self._active: list[Family] = []
        self._picked: Counter[Family] = Counter()
        self._unknown: Counter[Family] = Counter()
        self._width = width
        self._count = 0
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Begin a round: with nothing that was used before."""
        self.used = []
        self._picked.clear()
        self._unknown.clear()
        self._active = [self._fresh() for _ in range(self._width)]

    def pick(self, chance: random.Random) -> Family:
        """A family for the next request."""
        position = chance.randrange(self._width)
        with self._lock:
            family = self._active[position]
            self._picked[family] += 1
            if self._picked[family] >= FAMILY_OPERATIONS:
                self._active[position] = self._fresh()
        return family

    def blur(self, family: Family) -> None:
        """Note that nobody knows what came of an operation on `family`."""
        with self._lock:
            self._unknown[family] += 1
            if self._unknown[family] >= FAMILY_UNKNOWN and family in self._active:
                self._active[self._active.index(family)] = self._fresh()

    def _fresh(self) -> Family:
        self._count += 1
        family = Family(f"{self._count}/")
        self.used.append(family)
        return family


# ------------------------------------------------------------------ scratch


@contextlib.contextmanager
def _scratch(addresses: list[str], findings: Findings, interrupts: Interrupts) -> Iterator[None]:
    """Remove all keys under the scratch prefix in the end. One Ctrl-C doesn't hinder that."""
    try:
        yield
    finally:
        with interrupts.noted():
            try:
                with connect(addresses, discover=False, timeout_s=PATIENCE_S) as client:
                    remove_all(client, findings.prefix, PATIENCE_S)
            except DdbError as error:
                findings.fail(
                    f"The keys under {findings.prefix} could not be removed: {error.message}", error.exit_code
                )
