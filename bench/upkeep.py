"""What a cluster's own chores cost its clients: checkpoints, a newcomer that has to catch up, the garbage collector.

    python -m bench.upkeep --out upkeep.json
    python -m bench.upkeep --only checkpoints --keys 10000 --seconds 10

Laws:

1. The load goes on the whole time; with and without the chore are compared within the same seconds of the same cluster.
2. An operation counts as met by a checkpoint when its time, from sent to answered, and the checkpoint's overlap; as
   undisturbed when it lies wholly between two of them. What is neither counts nowhere.
3. A newcomer has caught up when it is a voter *and* has answered a linearizable read, from the start of its process on.

Theory. A checkpoint is written by every node after so many entries, and the nodes apply the same entries: so they
write at about the same time, and no majority is free of it. Here the nodes' own plan is set so far away that it never comes,
and all of them are told to write one (`snapshot`) after as many entries as the default plan waits for. They answer when it
is on disk, so it is known when it began and ended. The log's size can make a node write one as well: then the
snapshot's revision has moved meanwhile, and these seconds count as neither.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import cost, machine, outages
from bench.cluster import table
from bench.growth import cluster, sizes, started
from bench.load import Loop, fill, requests
from bench.options import ask
from bench.plan import Plan, Result
from bench.servers import READY_TIMEOUT_S, Server, commanded
from bench.systems import System, await_leader

PARTS = ("checkpoints", "join", "pauses")
NEVER = ("--checkpoint-every", str(1 << 40))
ENTRIES = 100_000  # the default of --checkpoint-every
SNAPSHOT_TIMEOUT_S = 120.0
AFTERMATH_S = 0.05  # the log's old segments are dropped just after a checkpoint
BEFORE_S, AFTER_S = 5.0, 2.0
LOOK_S = 0.02
KEY_BYTES = len("k0000000")

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Window:
    """Some time, on `time.perf_counter`'s clock."""

    began: float
    ended: float

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.ended - self.began


class Background(threading.Thread):
    """A load that goes on while the block of its `with` statement runs. `result` grows meanwhile."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(daemon=True)
        self._plan = replace(plan, timed=True)
        self._enough = threading.Event()
        self._failure: Exception | None = None
        self.result = Result(0.0)

    def run(self) -> None:
        """The thread's work."""
        try:
            loop = Loop(self._plan, self._plan.clients, 0, self.result)
            try:
                following = requests(self._plan, self._plan.seed)
                enough = self._enough.is_set
                loop.run(lambda d: None if enough() else following(d), self._plan.pipeline, enough)
            finally:
                loop.close()
        except Exception as error:  # raised where the block ends
            self._failure = error

    def wait(self, seconds: float) -> Window:
        """Let it go on for so long. Raises what ended it."""
        began = time.perf_counter()
        self.join(seconds)
        if self._failure is not None:
            raise self._failure
        return Window(began, time.perf_counter())

    @property
    def count(self) -> int:
        """How many operations have succeeded."""
        return len(self.result.latencies_s)

    def __enter__(self) -> Background:
        self.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._enough.set()
        self.join()
        if self._failure is not None and kind is None:
            raise self._failure


def within(result: Result, windows: Sequence[Window], touched: bool) -> Result:
    """The operations of `result`, a timed one, that lie in one of `windows`; with `touched`, those that overlap one.

    Windows are in order and do not overlap; replies are in the order in which they came.
    """
    found = Result(sum(w.seconds for w in windows))
    rest: Iterator[Window] = iter(windows)
    window = next(rest, None)
    for answered_at, latency_s in zip(result.answered_at, result.latencies_s):
        sent_at = answered_at - latency_s
        while window is not None and window.ended < (sent_at if touched else answered_at):
            window = next(rest, None)
        if window is None:
            break
        if (answered_at if touched else sent_at) >= window.began:
            found.latencies_s.append(latency_s)
    return found


# -------------------------------------------------------------- checkpoints


def tell(node: Server, **request: Any) -> dict[str, Any]:
    """A request to one node, which may take long. Raises OSError, ValueError; RuntimeError where it is refused."""
    reply = ask(node.address, SNAPSHOT_TIMEOUT_S, timeout=SNAPSHOT_TIMEOUT_S, **request)
    if reply["ok"] is not True:
        raise RuntimeError(f"{node.name} refuses {request}: {reply}")
    return reply


def checkpoint_all(nodes: Sequence[Server]) -> Window:
    """Let every node write a checkpoint, all at once: from when to when it took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(lambda node: tell(node, op="snapshot"), nodes))
    return Window(began, time.perf_counter() + AFTERMATH_S)


def revisions(nodes: Sequence[Server]) -> list[int]:
    """Up to where each node's checkpoint goes."""
    return [tell(node, op="status")["snapshot"]["rev"] for node in nodes]


def checkpoints(system: System, plan: Plan, entries: int, say: Say) -> dict[str, Any]:
    """Latencies of puts during checkpoints and between them; one after each `entries` puts, for `plan.seconds`."""
    fill(replace(plan, servers=(await_leader(system).address,)))
    checkpoint_all(system.nodes)
    quiet: list[Window] = []
    busy: list[Window] = []
    disturbed = 0
    with Background(replace(plan, servers=(await_leader(system).address,))) as load:
        load.wait(plan.warm_up_s)
        until = time.perf_counter() + plan.seconds
        while not busy or time.perf_counter() < until:
            before, count, began = revisions(system.nodes), load.count, time.perf_counter()
            while load.count < count + entries:
                load.wait(LOOK_S)
                if time.perf_counter() > began + READY_TIMEOUT_S + plan.seconds:
                    raise RuntimeError(f"{entries:,} puts took longer than {READY_TIMEOUT_S + plan.seconds:.0f} s")
            ended = time.perf_counter()
            if revisions(system.nodes) == before:
                quiet.append(Window(began, ended))
            else:
                disturbed += 1
            busy.append(checkpoint_all(system.nodes))
            load.wait(AFTERMATH_S)
    without = within(load.result, quiet, touched=False).summary()
    during = within(load.result, busy, touched=True).summary()
    stall = during["p99.9_ms"] / without["p99.9_ms"] if without["ops"] and during["ops"] else None
    say(f"checkpoints, {plan.keys:,} keys: p99.9 {without['p99.9_ms']} ms without, {during['p99.9_ms']} ms during")
    return {
        "keys": plan.keys, "clients": plan.clients, "entries": entries, "checkpoints": len(busy), "disturbed": disturbed,
        "checkpoint_s": round(sum(w.seconds - AFTERMATH_S for w in busy) / len(busy), 3),
        "without": without, "during": during, "stall": stall, "errors": dict(load.result.errors),
    }  # fmt: skip


# --------------------------------------------------------------- a newcomer


def _is_voter(leader: Server, newcomer: Server) -> bool:
    members = tell(leader, op="status")["members"]
    return any(m["address"] == newcomer.address and m["role"] == "voter" for m in members)


def join(system: System, plan: Plan, before_s: float, say: Say) -> dict[str, Any]:
    """Let a new, empty node join under load: how long it takes, and what the clients feel of it."""
    leader = await_leader(system)
    plan = replace(plan, servers=(leader.address,))
    fill(plan)
    checkpoint_all(system.nodes)  # or what they do behind the fill would be in `before`
    with Background(plan) as load:
        load.wait(plan.warm_up_s)
        before = load.wait(before_s)
        newcomer = system.add()
        began = time.perf_counter()
        newcomer.start()
        read_at = outages.first_answer(plan, [newcomer.address], outages.get, LOOK_S)
        while not _is_voter(await_leader_of(system, newcomer), newcomer):
            load.wait(LOOK_S)
            newcomer.check()
            if time.perf_counter() > began + outages.GIVE_UP_S:
                raise RuntimeError(f"{newcomer.name} has not become a voter in {outages.GIVE_UP_S:.0f} s")
        meanwhile = Window(began, time.perf_counter())
        after = load.wait(AFTER_S)
    ops = [within(load.result, [w], touched=False).summary() for w in (before, meanwhile, after)]
    data_bytes = plan.keys * (KEY_BYTES + plan.value_bytes)
    file_bytes = sum(path.stat().st_size for path in (newcomer.directory / newcomer.name).glob("state.db"))
    figures = {
        "keys": plan.keys, "data_mb": round(data_bytes / 1e6, 1), "file_mb": round(file_bytes / 1e6, 1),
        "read_s": round(read_at - began, 3), "caught_up_s": round(meanwhile.seconds, 3),
        "mb_per_s": round(data_bytes / 1e6 / meanwhile.seconds, 1),
        "before": ops[0], "meanwhile": ops[1], "after": ops[2],
        "served": round(ops[1]["ops_per_s"] / ops[0]["ops_per_s"], 3), "errors": dict(load.result.errors),
    }  # fmt: skip
    say(
        f"join, {plan.keys:,} keys: {figures['caught_up_s']} s, {figures['mb_per_s']} MB/s; "
        f"{ops[1]['ops_per_s']:,.0f} of {ops[0]['ops_per_s']:,.0f} puts a second meanwhile"
    )
    return figures


def await_leader_of(system: System, newcomer: Server) -> Server:
    """The leader as a member that was there before the newcomer knows it, whether or not all are voters yet."""
    older = [node for node in system.nodes if node is not newcomer]
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        leader = tell(older[0], op="status")["leader"]
        found = [node for node in older if leader and node.address == leader["address"]]
        if found:
            return found[0]
        time.sleep(LOOK_S)
    raise RuntimeError(f"{system.name} has had no leader for {READY_TIMEOUT_S:.0f} s")


# ---------------------------------------------------- the garbage collector


def pauses(system: cost.Metered, plan: Plan, say: Say) -> dict[str, Any]:
    """The collector's pauses on leader and follower while the keys are put the first time, and then again."""
    leader = await_leader(system)
    follower = next(node for node in system.nodes if node is not leader)
    plan = replace(plan, servers=(leader.address,))
    with cost.watched(system, [leader, follower]) as seen_filling:
        fill(plan)
    with cost.watched(system, [leader, follower]) as seen_putting, Background(plan) as load:
        load.wait(plan.seconds)
    found = {
        work: {role: seen[node.name]["pauses"] for role, node in (("leader", leader), ("follower", follower))}
        for work, seen in (("filling", seen_filling), ("putting", seen_putting))
    }
    load.result.seconds = plan.seconds
    say(f"pauses, {plan.keys:,} keys: the longest took {longest_ms(found):.1f} ms")
    return {"keys": plan.keys, "pauses": found, "put": load.result.summary()}


def longest_ms(found: dict[str, dict[str, dict[str, Any]]]) -> float:
    """The longest of all pauses."""
    return max((p["max_ms"] for roles in found.values() for all_ in roles.values() for p in all_.values()), default=0.0)


# ----------------------------------------------------------------- the tables


def show(upkeep: dict[str, Any]) -> str:
    """What was measured, as tables."""
    parts = [_show_checkpoints(upkeep["checkpoints"]), _show_join(upkeep["join"]), _show_pauses(upkeep["pauses"])]
    return "\n\n".join(part for part in parts if part)


def _ms(figures: dict[str, Any], name: str) -> str:
    return "-" if figures[name] is None else f"{figures[name]:.2f}"


def _show_checkpoints(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for r in rows:
        for when, label in (("without", "between"), ("during", "during")):
            f = r[when]
            times = f"{r['stall']:.2f}×" if r["stall"] is not None and when == "during" else ""
            lines.append([
                f"{r['keys']:,}", label, f"{f['ops']:,}", f"{f['ops_per_s']:,.0f}",
                *(_ms(f, n) for n in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")), times,
            ])  # fmt: skip
    if not lines:
        return ""
    note = "; ".join(
        f"{r['keys']:,} keys: {r['checkpoints']} checkpoints, one after each {r['entries']:,} puts, of {r['checkpoint_s']:.2f} s"
        + (f", {r['disturbed']} stretches between them not counted" if r["disturbed"] else "")
        for r in rows
    )
    columns = ("keys", "checkpoints", "puts", "puts/s", "p50 ms", "p99 ms", "p99.9 ms", "max ms", "p99.9")
    return f"{table(columns, lines, left=2)}\n\n{note}."


def _show_join(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            f"{r['keys']:,}", f"{r['data_mb']:,.0f} ({r['file_mb']:,.0f})", f"{r['read_s']:.2f}", f"{r['caught_up_s']:.2f}",
            f"{r['mb_per_s']:.0f}", f"{r['before']['ops_per_s']:,.0f}", f"{r['meanwhile']['ops_per_s']:,.0f}",
            f"{100 * r['served']:.0f} %", f"{r['after']['ops_per_s']:,.0f}", _ms(r["meanwhile"], "p99_ms"),
            str(sum(r["errors"].values())),
        ]
        for r in rows
    ]  # fmt: skip
    columns = (
        "new node, keys", "MB of data (of file)", "first read, s", "and a voter, s", "MB/s of data", "puts/s before",
        "meanwhile", "of before", "after", "p99 ms meanwhile", "errors",
    )  # fmt: skip
    return table(columns, lines, left=1) if lines else ""


def _show_pauses(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        [f"{r['keys']:,}", work, role, generation, str(p["count"]), f"{p['total_ms']:.1f}", f"{p['max_ms']:.1f}"]
        for r in rows for work, roles in r["pauses"].items() for role, all_ in roles.items()
        for generation, p in all_.items()
    ]  # fmt: skip
    columns = ("garbage collection, keys", "while", "node", "generation", "times", "all, ms", "longest, ms")
    return table(columns, lines, left=3) if lines else ""


# ----------------------------------------------------------- the command line


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.upkeep", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--only", default=",".join(PARTS), help="of %(default)s")
    p.add_argument("--keys", type=sizes, default=[10_000, 1_000_000], metavar="N,…", help="checkpoints (10000,1000000)")
    p.add_argument("--entries", type=int, default=ENTRIES, help="between two checkpoints (default %(default)s)")
    p.add_argument("--join-keys", type=sizes, default=[1_000_000], metavar="N,…", help="a new node joins (1000000)")
    p.add_argument("--pause-keys", type=sizes, default=[1_000_000], metavar="N,…", help="for the collector (1000000)")
    p.add_argument("--clients", type=int, default=64, help="(default %(default)s)")
    p.add_argument("--seconds", type=float, default=25.0, help="of checkpoints, each (default %(default)s)")
    p.add_argument(
        "--before", type=float, default=BEFORE_S, metavar="SECONDS", help="a join, and of pauses (default %(default)s)"
    )
    p.add_argument("--warm-up", type=float, default=1.0, metavar="SECONDS", help="(default %(default)s)")
    p.add_argument("--dir", type=Path, help="on the disk to be measured (default: a temporary directory)")
    p.add_argument("--out", type=Path, help="write every figure there, as JSON")
    return p


def measure(a: argparse.Namespace, say: Say, found: dict[str, list[dict[str, Any]]]) -> None:
    """All that was asked for; `found` grows, so what was measured before a failure is kept."""
    base = Plan((), a.clients, seconds=a.seconds, warm_up_s=a.warm_up, fill=False)
    parts = a.only.split(",")
    for keys in a.keys if "checkpoints" in parts else ():
        with cluster(3, a.dir, NEVER) as system:
            found["checkpoints"].append(checkpoints(system, replace(base, keys=keys), a.entries, say))
    for keys in a.join_keys if "join" in parts else ():
        with cluster(3, a.dir) as system:
            found["join"].append(join(system, replace(base, keys=keys), a.before, say))
    for keys in a.pause_keys if "pauses" in parts else ():
        with started(cost.Metered, a.dir) as watched:
            found["pauses"].append(pauses(watched, replace(base, keys=keys, seconds=a.before), say))


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    if not set(a.only.split(",")) <= set(PARTS):
        p.error(f"--only takes {', '.join(PARTS)}")
    if min(a.clients, a.entries) < 1 or min(a.seconds, a.before) <= 0 or a.warm_up < 0:
        p.error("clients, entries and seconds must be positive")
    found: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    code = 0
    try:
        if a.dir:
            a.dir.mkdir(parents=True, exist_ok=True)
        measure(a, lambda text: print(text, file=sys.stderr, flush=True), found)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"bench.upkeep: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        code = 130
    facts = machine.facts(a.dir or Path(tempfile.gettempdir()))
    if a.out:
        command = " ".join(["python -m bench.upkeep", *(sys.argv[1:] if arguments is None else arguments)])
        a.out.write_text(json.dumps({"machine": facts, "command": command, "upkeep": found}, indent=1) + "\n")
    print(f"{machine.sentence(facts)}\n\n{show(found)}")
    return code


if __name__ == "__main__":
    sys.exit(commanded(main))
