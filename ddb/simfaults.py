"""What goes wrong in a simulation, when, and for how long: a swarm of faults, drawn before it begins.

Laws: the list of faults is drawn from the seed alone, so it can be shown, cut short and replayed; who "the leader" is,
a fault finds out when it strikes. What destroys data strikes no more members at a time than a cluster survives:
the rest is allowed to all of them at once.

Theory. A run with every fault finds less than many runs with a few of them each: faults mask one another, and a bug may need
a long quiet stretch before the one that matters (Groce et al., "Swarm Testing", ISSTA 2012). So each seed
draws first which faults it knows, then how often they come, then when.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddb.simtown import Town

Undo = Callable[[], None] | None


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong, at `at_s`, until `for_s` later where it can be undone. `where` picks the hosts that it
    strikes, `how` its variety: numbers from [0, 1)."""

    at_s: float
    kind: str
    for_s: float
    where: float
    how: float

    def __str__(self) -> str:
        return f"{self.kind} at {self.at_s:.3f} s for {self.for_s:.3f} s"


def swarm(rng: random.Random, until_s: float, kinds: tuple[str, ...] | None) -> list[Fault]:
    """The faults of one run, by time. `kinds` are those that may be among them (None: all)."""
    known = [kind for kind in KINDS if kinds is None or kind in kinds]
    if kinds is None:
        share = rng.choice([0.15, 0.3, 0.6, 1.0])
        known = [kind for kind in known if rng.random() < share]
    faults: list[Fault] = []
    if not known:
        return faults
    pause_s = rng.choice([0.3, 1.0, 3.0])
    at_s = 1.0 + rng.expovariate(1 / pause_s)
    while at_s < until_s:
        for_s = rng.choice([0.05, 0.5, 2.0, 6.0, 12.0]) * (0.5 + rng.random())
        faults.append(Fault(at_s, rng.choice(known), for_s, rng.random(), rng.random()))
        at_s += rng.expovariate(1 / pause_s)
    return faults


def strike(fault: Fault, town: Town) -> Undo:
    """Let `fault` happen in `town`. Returns how to undo it, where there is something to undo."""
    return KINDS[fault.kind](fault, town)


# ------------------------------------------------------------------- network


def _cut(town: Town, links: list[tuple[str, str]]) -> Undo:
    town.network.block(links)
    return lambda: town.network.unblock(links)


def _between(left: list[str], right: list[str]) -> list[tuple[str, str]]:
    return [link for a in left for b in right for link in ((a, b), (b, a))]


def _isolate(fault: Fault, town: Town) -> Undo:
    """One node is cut off from all others: the leader, mostly."""
    victim = town.victim(fault.where)
    return _cut(town, _between([victim], [n for n in town.nodes if n != victim]))


def _mute(fault: Fault, town: Town) -> Undo:
    """One node, mostly the leader, hears the others and can't be heard."""
    victim = town.victim(fault.where)
    return _cut(town, [(victim, n) for n in town.nodes if n != victim])


def _deafen(fault: Fault, town: Town) -> Undo:
    """One node, mostly the leader, is heard and hears nobody."""
    victim = town.victim(fault.where)
    return _cut(town, [(n, victim) for n in town.nodes if n != victim])


def _split(fault: Fault, town: Town) -> Undo:
    """A minority, with the leader in it mostly, and a majority."""
    order = town.nodes_from(fault.where)
    size = max(1, int(fault.how * (len(order) + 1) / 2))
    return _cut(town, _between(order[:size], order[size:]))


def _bridge(fault: Fault, town: Town) -> Undo:
    """Two halves that only one node in between can reach."""
    order = town.nodes_from(fault.where)
    half = (len(order) - 1) // 2
    return _cut(town, _between(order[1 : half + 1], order[half + 1 :]))


def _ring(fault: Fault, town: Town) -> Undo:
    """Each node reaches its two neighbours alone."""
    order = town.nodes_from(fault.where)
    count = len(order)
    links = [
        (order[a], order[b])
        for a in range(count)
        for b in range(count)
        if a != b and (a - b) % count not in (1, count - 1)
    ]
    return _cut(town, links)


def _cut_one_way(fault: Fault, town: Town) -> Undo:
    """One link, in one direction."""
    order = town.nodes_from(fault.where)
    link = (order[0], order[1]) if fault.how < 0.5 else (order[1], order[0])
    return _cut(town, [link])


def _slow(town: Town, links: list[tuple[str, str]], delay_s: float) -> Undo:
    town.network.slow.update(dict.fromkeys(links, delay_s))

    def undo() -> None:
        for link in links:
            town.network.slow.pop(link, None)

    return undo


def _slow_links(fault: Fault, town: Town) -> Undo:
    """All links of one node take long."""
    victim = town.victim(fault.where)
    return _slow(town, _between([victim], [n for n in town.nodes if n != victim]), 0.01 + fault.how * 0.5)


def _reset(fault: Fault, town: Town) -> Undo:
    """The connections between two nodes break, or those of the clients with one."""
    order = town.nodes_from(fault.where)
    if fault.how < 0.3:
        for name in [who.name for who in town.clients] + [who.name for who in town.watchers]:
            town.network.reset(name, order[0])
        return None
    town.network.reset(order[0], order[1])
    if fault.how < 0.6:
        town.network.reset(order[1], order[0])
    return None


def _chance(town: Town, name: str, likely: float) -> Undo:
    setattr(town.network.chances, name, likely)
    return lambda: setattr(town.network.chances, name, 0.0)


def _lose(fault: Fault, town: Town) -> Undo:
    """Messages of the consensus get lost."""
    return _chance(town, "loss", 0.02 + 0.3 * fault.how)


def _repeat(fault: Fault, town: Town) -> Undo:
    """Messages of the consensus come twice."""
    return _chance(town, "repeat", 0.05 + 0.5 * fault.how)


def _reorder(fault: Fault, town: Town) -> Undo:
    """Messages of the consensus overtake one another."""
    return _chance(town, "reorder", 0.05 + 0.5 * fault.how)


# ----------------------------------------------------------------- processes


def _kill(fault: Fault, town: Town) -> Undo:
    """kill -9, and a restart."""
    town.kill(town.victim(fault.where), power=False, back_in_s=fault.for_s)
    return None


def _power(fault: Fault, town: Town) -> Undo:
    """One machine loses its power."""
    town.kill(town.victim(fault.where), power=True, back_in_s=fault.for_s)
    return None


def _blackout(fault: Fault, town: Town) -> Undo:
    """All machines lose their power at once, or each at its next fdatasync, and come back one by one."""
    for number, name in enumerate(town.nodes_from(fault.where)):
        back_in_s = min(fault.for_s, 2.0) * (1 + number * fault.how)
        if fault.how < 0.1 and town.node(name) is not None:
            town.hosts[name].crash_in, town.hosts[name].crash_only = 0, "fdatasync"
            town.back_in_s[name] = back_in_s
        else:
            town.kill(name, power=True, back_in_s=back_in_s)
    return None


def _crash_point(fault: Fault, town: Town) -> Undo:
    """A machine dies before one of its next few effects."""
    host = town.hosts[town.victim(fault.where)]
    host.crash_in = int(fault.how * 40)
    host.crash_only = (None, "send", "fdatasync", "pwrite", None)[int(fault.how * 1000) % 5]
    town.back_in_s[host.name] = fault.for_s
    return None


def _pause(fault: Fault, town: Town) -> Undo:
    """SIGSTOP, and SIGCONT."""
    host = town.hosts[town.victim(fault.where)]
    if host.program is None:
        return None
    host.pause()
    return host.resume


def _restart(fault: Fault, town: Town) -> Undo:
    """SIGTERM, and a start."""
    town.terminate(town.victim(fault.where), back_in_s=fault.for_s)
    return None


def _clock_jump(fault: Fault, town: Town) -> Undo:
    """The time of day jumps by hours; the steady clock by less, and only forward."""
    host = town.hosts[town.victim(fault.where)]
    host.wall_ahead_ms += int((fault.how - 0.5) * 10 * 3_600_000)
    if fault.how > 0.5:
        jump_s = (fault.how - 0.5) * 4
        host.ahead_s += jump_s
        host.jumped_s += max(jump_s, 0.0)
    return None


# --------------------------------------------------------------------- disks


def _slow_disk(fault: Fault, town: Town) -> Undo:
    """One disk takes long for each fsync."""
    host = town.hosts[town.victim(fault.where)]
    before, host.fsync_s = host.fsync_s, 0.02 + fault.how * 0.5

    def undo() -> None:
        host.fsync_s = before

    return undo


def _full_disk(fault: Fault, town: Town) -> Undo:
    """One disk is full, or soon will be."""
    host = town.hosts[town.victim(fault.where)]
    host.disk.room_bytes = int(fault.how * 3000) if fault.how > 0.3 else 0

    def undo() -> None:
        host.disk.room_bytes = None

    return undo


def _failing_fsync(fault: Fault, town: Town) -> Undo:
    """An fsync fails once."""
    host = town.hosts[town.victim(fault.where)]
    if not town.may_lose_data(host.name):
        return None
    host.disk.fail("fdatasync", errno.EIO, nth=1 + int(fault.how * 10), times=1)
    town.back_in_s[host.name] = fault.for_s
    return host.disk.faults.clear


def _flip(fault: Fault, town: Town) -> Undo:
    """A bit rots in the log or in the snapshot, while the machine is off."""
    name = town.victim(fault.where)
    host = town.hosts[name]
    if not town.may_lose_data(name):
        return None
    town.kill(name, power=True, back_in_s=fault.for_s)
    files = [path for path in host.disk.names if path.suffix in (".log", ".db") and host.disk.content(path)]
    if files:
        town.rotten.add(name)
        path: Path = sorted(files)[int(fault.how * len(files))]
        host.disk.flip(path, town.rng)
        town.met(f"bit flipped in {'the log' if path.suffix == '.log' else 'the snapshot'}")
    return None


def _wipe(fault: Fault, town: Town) -> Undo:
    """A machine comes back with an empty disk."""
    name = town.victim(fault.where)
    if not town.registry_knows or not town.may_lose_data(name):
        return None
    town.kill(name, power=True, back_in_s=fault.for_s)
    town.wipe(name)
    return None


def _lost_tail(fault: Fault, town: Town) -> Undo:
    """A disk loses the end of the log that it had called durable."""
    name = town.victim(fault.where)
    host = town.hosts[name]
    if not town.may_lose_data(name):
        return None
    town.kill(name, power=True, back_in_s=fault.for_s)
    logs = [path for path in sorted(host.disk.names) if path.suffix == ".log"]
    if logs:
        content = host.disk.content(logs[-1]).rstrip(b"\n")
        cut = max(1, int(len(content) - fault.how * 400))
        while cut > 1 and b"\n" in content[cut - 1 : cut + 1]:
            cut -= 1  # what ends with a whole record shows nothing: that would be a disk that lies, and nobody can tell
        host.disk.put(logs[-1], content[:cut])
        town.rotten.add(name)
        town.met("durable tail lost")
    return None


# ---------------------------------------------------------------- operations


def _registry_down(fault: Fault, town: Town) -> Undo:
    """The registry is killed, at once or before one of its next few effects, and started again later."""
    if fault.how > 0.7 and town.hosts["registry"].program is not None:
        town.hosts["registry"].crash_in = int((fault.how - 0.7) * 40)
        town.back_in_s["registry"] = fault.for_s
    else:
        town.kill("registry", power=fault.how < 0.5, back_in_s=fault.for_s)
    return None


def _registry_wiped(fault: Fault, town: Town) -> Undo:
    """The registry loses its memory, while all nodes are there to tell it again."""
    if not town.all_belong:
        return None
    town.kill("registry", power=True, back_in_s=fault.for_s)
    town.hosts["registry"].disk.wipe()
    town.met("registry wiped")
    return None


def _registry_slow(fault: Fault, town: Town) -> Undo:
    """The registry's links take long."""
    return _slow(town, _between(["registry"], town.nodes), 0.1 + fault.how)


def _join(fault: Fault, town: Town) -> Undo:
    """One more node starts."""
    town.join()
    return None


def _remove(fault: Fault, town: Town) -> Undo:
    """Somebody asks the cluster to remove a member; while one has lost its data, only that one."""
    node = town.node(town.victim(fault.where))
    ids = [id for id, _ in town.damaged.values()] or ([node.id] if node is not None else [])
    if ids:
        town.ask({"op": "member_remove", "name": ids[0]})
    return None


def _transfer(fault: Fault, town: Town) -> Undo:
    """Somebody asks the leader to hand over."""
    town.ask({"op": "transfer"} if fault.how < 0.3 else {"op": "transfer", "to": town.nodes_from(fault.where)[-1]})
    return None


def _checkpoint(fault: Fault, town: Town) -> Undo:
    """Somebody asks a node for a checkpoint."""
    town.ask({"op": "snapshot"}, at=town.victim(fault.where))
    return None


KINDS: Final[dict[str, Callable[[Fault, Town], Undo]]] = {
    "isolate": _isolate,
    "mute": _mute,
    "deafen": _deafen,
    "split": _split,
    "bridge": _bridge,
    "ring": _ring,
    "one-way": _cut_one_way,
    "slow-links": _slow_links,
    "reset": _reset,
    "lose": _lose,
    "repeat": _repeat,
    "reorder": _reorder,
    "kill": _kill,
    "power": _power,
    "blackout": _blackout,
    "crash-point": _crash_point,
    "pause": _pause,
    "restart": _restart,
    "clock-jump": _clock_jump,
    "slow-disk": _slow_disk,
    "full-disk": _full_disk,
    "failing-fsync": _failing_fsync,
    "flip": _flip,
    "wipe": _wipe,
    "lost-tail": _lost_tail,
    "registry-down": _registry_down,
    "registry-wiped": _registry_wiped,
    "registry-slow": _registry_slow,
    "join": _join,
    "remove": _remove,
    "transfer": _transfer,
    "checkpoint": _checkpoint,
}
"""Every kind of fault, by the name that `--faults` takes."""
