"""What a recipe decides, step by step: locks, elections, queues and barriers without I/O.

Laws:

1. Who holds what is decided by the log alone: by the revision that made each one's key, which is also its fencing token.
   So tokens grow from holder to holder, and they queue in the order of their asking.
2. A key of a recipe hangs on a lease, so a dead holder's vanishes. It bears the lease's id in its name: nobody else
   ever makes it, so that making it may be tried again whatever became of the first attempt.
3. Who waits in a line for one place watches the key before its own and no other: when a holder leaves, one wakes up.

Theory. A *plan* is a generator: it yields what it wants done (a `Wish`) and is sent what came of it (driving.py; a DdbError is
thrown in), so the blocking and the asyncio client share every decision, and a test needs neither. Its steps are read with `yield from ask(question)`, which
gives the question's own answer back.

A line is a prefix in the database, `ddb/lock/NAME/`, and each who stands in it has a key below: the lease's id as 16
hexadecimal digits; a key that is no such number behind the prefix was put there by somebody else, and is passed over. Who
has fewer than `limit` before it, is in; else it waits until one of those is gone, and looks again: for that one
may have given up waiting rather than held.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ddb import questions
from ddb.calls import SECONDS_MAX, seconds
from ddb.commands import KEY_BYTES_MAX
from ddb.errors import BadRequest, Compacted, DdbError, LockLost, TooLarge
from ddb.keeping import Numbers
from ddb.questions import Question
from ddb.results import Event, Item, ScanResult

T = TypeVar("T")

ROOT: Final = "ddb/"
PAGE: Final = 10_000
QUEUE_PAGE: Final = 16
RETRY_FIRST_S: Final = 0.02
RETRY_MAX_S: Final = 0.5
LOOK_AGAIN_S: Final = 15.0
PREFIX_BYTES_MAX: Final = KEY_BYTES_MAX - len("claim/0123456789abcdef")  # the longest that stands behind one


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask this question, as a write of the session that `numbers` belongs to, if any. Answered with what it reads; a
    DdbError is thrown."""

    question: Question[Any]
    numbers: Numbers | None = None


@dataclass(frozen=True, slots=True)
class Await:
    """Follow the changes of `key`, or of what begins with `prefix`, from revision `from_rev` on, until one is `wanted`.
    Answered with that event, or with None where there is none by the moment `until_s()`, which may move meanwhile (None:
    for ever). Compacted is thrown."""

    key: str | None
    prefix: str | None
    from_rev: int
    until_s: Callable[[], float | None]
    wanted: Callable[[Event], bool]


@dataclass(frozen=True, slots=True)
class Rest:
    """Go on after `seconds`."""

    seconds: float


Wish = Ask | Await | Rest
Plan = Generator[Wish, Any, T]


def ask(question: Question[T], numbers: Numbers | None = None) -> Plan[T]:
    """The plan of one question."""
    answer: T = yield Ask(question, numbers)
    return answer


def deadline_s(now: Callable[[], float], wait_s: float | None) -> float | None:
    """The moment by the clock `now` until which one waits who waits for `wait_s`; None: for ever. Raises BadRequest where
    that is no number of seconds."""
    if wait_s is None or seconds(wait_s, "wait_s") >= SECONDS_MAX:
        return None
    return now() + wait_s


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a place: until `deadline_s` by the clock `now` (None: for ever), and only as long as what was
    already got is surely kept, which is until `kept_until_s()`."""

    now: Callable[[], float]
    deadline_s: float | None = None
    kept_until_s: Callable[[], float | None] = lambda: None

    def until_s(self) -> float | None:
        """The moment at which waiting ends, as it looks now."""
        ends = [end for end in (self.deadline_s, self.kept_until_s()) if end is not None]
        return min(ends, default=None)

    def a_while(self) -> Callable[[], float]:
        """The same, but not later than in LOOK_AGAIN_S: for who waits at a node that is cut off from the others would not be
        told what happens there, so who can, looks again from time to time."""
        look_s = self.now() + LOOK_AGAIN_S
        return lambda: min(until, look_s) if (until := self.until_s()) is not None else look_s

    @property
    def over(self) -> bool:
        """Whether there is no time left."""
        return self.deadline_s is not None and self.now() >= self.deadline_s

    @property
    def lost(self) -> bool:
        """Whether what was got may be gone."""
        until_s = self.kept_until_s()
        return until_s is not None and self.now() >= until_s


# ------------------------------------------------------------------- lines


def prefix_of(kind: str, name: str) -> str:
    """Where a recipe of this `kind` and `name` has its keys, and no other one has any.

    Raises BadRequest where the name is no text or an empty one, TooLarge where the keys would be longer than keys may be:
    before anything is asked for, so that nobody waits in a line in which nobody can stand.
    """
    whose = "double barrier" if kind == "double" else kind
    if not isinstance(name, str):
        raise BadRequest(f"The {whose}'s name must be a string, not of type {type(name).__name__}.")
    if not name:
        raise BadRequest(f"The {whose}'s name must not be empty.")
    prefix = f"{ROOT}{kind}/{name.replace('%', '%25').replace('/', '%2F')}/"
    try:
        bytes_more = len(prefix.encode()) - PREFIX_BYTES_MAX
    except UnicodeEncodeError:
        raise BadRequest(f"The {whose}'s name holds an unpaired surrogate.") from None
    if bytes_more > 0:
        raise TooLarge(f"The {whose}'s name is {bytes_more} bytes too long (a / or % in it counts as three).")
    return prefix


def key_of(prefix: str, number: int) -> str:
    """The key of one who stands in the line at `prefix`: its lease's id is its number."""
    return f"{prefix}{number:016x}"


_NUMBER: Final = re.compile("[0-9a-f]{16}")


def numbered(items: Sequence[Item], prefix: str) -> list[Item]:
    """Those of `items` that stand in the line at `prefix` itself."""
    return [item for item in items if _NUMBER.fullmatch(item.key, len(prefix))]


def standing(prefix: str) -> Plan[tuple[list[Item], int]]:
    """Who stands in a line, in the order of coming, and the revision that shows it so."""
    question: Question[ScanResult] | None = questions.scan(prefix, limit=PAGE)
    found: list[Item] = []
    rev = 0
    while question is not None:
        page = yield from ask(question)
        rev = rev or page.rev  # what changed between two pages is told by a watch from the first one on
        found += numbered(page.items, prefix)
        question = questions.following(question, page)
    return sorted(found, key=lambda item: item.created), rev


def come(prefix: str, lease: int, value: Any, patience: Patience) -> Plan[str]:
    """Stand in the line at `prefix`; returns the key. Raises LockLost where the lease is gone."""
    key = key_of(prefix, lease)
    question = questions.put(key, value, {"exists": False}, lease)
    try:
        yield from insist(question, lambda: not patience.over and not patience.lost)
    except DdbError as error:
        if "lease" in error.fields:
            raise LockLost(f"The lease of {key} ran out before it was used.") from None
        raise
    return key


def insist(question: Question[T], again: Callable[[], bool]) -> Plan[T]:
    """Ask a question that does no harm when it is answered twice, until the answer is known."""
    pause_s = RETRY_FIRST_S
    while True:
        try:
            return (yield from ask(question))
        except DdbError as error:
            if error.definite or not again():
                raise
        yield Rest(pause_s)
        pause_s = min(2 * pause_s, RETRY_MAX_S)


def enter(prefix: str, limit: int, lease: int, value: Any, patience: Patience) -> Plan[Item | None]:
    """Stand in the line at `prefix` until fewer than `limit` are before. Returns one's own item, whose `created` is the
    fencing token, or None where time is over. Raises LockLost where the lease ran out meanwhile."""
    key = yield from come(prefix, lease, value, patience)
    while True:
        line, rev = yield from standing(prefix)
        mine = next((item for item in line if item.key == key), None)
        if mine is None or patience.lost:
            raise LockLost(f"The lease of {key} ran out while it waited.")
        before = [item.key for item in line if item.created < mine.created]
        if len(before) < limit:
            return mine
        if patience.over:
            return None
        yield from _until_moved(prefix, before, limit, rev, patience)


def _until_moved(prefix: str, before: list[str], limit: int, rev: int, patience: Patience) -> Plan[None]:
    """Wait until fewer than `limit` of those `before` may be left, or time is over (law 3)."""
    left = set(before)

    def moved(event: Event) -> bool:
        left.difference_update([event.key] if event.kind == "delete" else [])
        return len(left) < len(before) if limit == 1 else len(left) < limit

    key, under = (before[-1], None) if limit == 1 else (None, prefix)
    try:
        yield Await(key, under, rev + 1, patience.a_while(), moved)
    except Compacted:
        return  # looks again


# --------------------------------------------------------------- elections


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads: the `value` it campaigned with or proclaimed since, and the `token` of its leadership."""

    value: Any
    token: int


class Roll:
    """Who stands in an election, kept up to date by the events of its prefix; the first one leads."""

    def __init__(self, prefix: str, line: Sequence[Item]) -> None:
        self._prefix = prefix
        self._standing = {item.key: Leader(item.value, item.created) for item in line}

    @property
    def leader(self) -> Leader | None:
        """Who leads, if anybody does."""
        return min(self._standing.values(), key=lambda one: one.token, default=None)

    def take(self, event: Event) -> None:
        """Note what has changed."""
        if not _NUMBER.fullmatch(event.key, len(self._prefix)):
            return
        if event.kind == "delete":
            self._standing.pop(event.key, None)
        elif event.version == 1:
            self._standing[event.key] = Leader(event.value, event.rev)
        elif event.key in self._standing:
            self._standing[event.key] = Leader(event.value, self._standing[event.key].token)


def proclaim(key: str, value: Any, lease: int) -> Plan[None]:
    """Give the value of one who leads anew. Raises LockLost where it leads no more."""
    done = yield from insist(questions.put(key, value, {"exists": True}, lease), lambda: True)
    if not done.applied:
        raise LockLost("This candidate leads no more; campaign again.")


# ---------------------------------------------------------------- barriers


def fallen(prefix: str, patience: Patience) -> Plan[bool]:
    """Wait until nobody stands at `prefix`. Returns whether that came in time."""
    while True:
        line, rev = yield from standing(prefix)
        if not line:
            return True
        if patience.over:
            return False
        yield from _until_gone(prefix, {item.key for item in line}, rev, patience)


def _until_gone(prefix: str, keys: set[str], rev: int, patience: Patience) -> Plan[bool]:
    """Wait until all these `keys` are gone, or time is over. Returns whether they are."""
    left = set(keys)

    def all_gone(event: Event) -> bool:
        left.difference_update([event.key] if event.kind == "delete" else [])
        return not left

    while left:
        try:
            yield Await(None, prefix, rev + 1, patience.a_while(), all_gone)
        except Compacted:
            pass  # looks again
        if not left or patience.over or patience.lost:
            break
        line, rev = yield from standing(prefix)
        left &= {item.key for item in line}
    return not left


def meet(prefix: str, count: int, lease: int, patience: Patience) -> Plan[set[str] | None]:
    """Come to `prefix`, and wait until `count` are there at one moment. Returns their keys, or None where time is over.

    The line is looked at before one comes oneself, and followed from there: so nobody misses the moment, even where
    some have left again since.
    """
    line, rev = yield from standing(prefix)
    here = {item.key for item in line}
    met: set[str] = set()

    def complete(event: Event) -> bool:
        if event.kind == "put":
            here.add(event.key)
        else:
            here.discard(event.key)
        if len(here) >= count:
            met.update(here)
        return bool(met)

    yield from come(prefix, lease, None, patience)
    yield Await(None, prefix, rev + 1, patience.until_s, complete)
    if patience.lost:
        raise LockLost("The lease of a barrier's participant ran out while it waited.")
    return met or None


def part(prefix: str, met: set[str], lease: int, patience: Patience) -> Plan[bool]:
    """Leave the others that were `met`, and wait until all of them have left. Returns whether they did in time. Raises LockLost
    where the lease has run out: the others may have left before."""
    line, rev = yield from standing(prefix)
    left = met & {item.key for item in line}
    try:
        yield from ask(questions.lease_revoke(lease))
    except BadRequest as error:
        if "lease" not in error.fields:
            raise
        raise LockLost("The lease of a barrier's participant ran out within: the others took it for dead.") from None
    return (yield from _until_gone(prefix, left, rev, patience)) if left else True


# ------------------------------------------------------ queues and counters


def append(name: str, value: Any, numbers: Numbers) -> Plan[int]:
    """Put `value` at the end of a queue; returns its ticket.

    The ticket is drawn first, so of two puts of which one ended before the other began, the first one's comes first.
    """
    drawn = yield from ask(questions.incr(f"{prefix_of('queue', name)}tickets"), numbers)
    yield from ask(questions.put(key_of(items_of(name), drawn.value), value), numbers)
    return drawn.value


def items_of(name: str) -> str:
    """Where the items of a queue are."""
    return f"{prefix_of('queue', name)}item/"


def claim_of(name: str, item: Item) -> str:
    """The key that says that somebody works on `item`."""
    return f"{prefix_of('queue', name)}claim/{item.key[-16:]}"


def take(name: str, numbers: Numbers, patience: Patience) -> Plan[Item | None]:
    """Take the first item of a queue that nobody works on, waiting for one. Returns None where time is over.

    Whoever deletes an item's key has taken it: the log lets exactly one succeed.
    """
    while True:
        items, rev = yield from _unclaimed(name)
        for item in items:
            free: list[questions.Condition] = [{"rev": item.rev}, {"key": claim_of(name, item), "exists": False}]
            done = yield from ask(questions.delete(item.key, free), numbers)
            if done.deleted:
                return item
        if patience.over:
            return None
        if not items:
            yield from _until_offered(name, rev, patience)


def claim(name: str, lease: int, patience: Patience) -> Plan[tuple[Item, int] | None]:
    """Claim the first item of a queue that nobody works on, waiting for one: it stays where it is, and is free again when
    the lease ends. Returns it with the claim's revision, or None where time is over. Raises LockLost where the lease
    ran out."""
    while True:
        items, rev = yield from _unclaimed(name)
        for item in items:
            key = claim_of(name, item)
            put = questions.put(key, lease, {"exists": False}, lease)
            done = yield from insist(put, lambda: not patience.lost)
            if not done.applied and done.value != lease:
                continue
            if (yield from ask(questions.get(item.key))) is not None:
                return item, done.rev
            yield from insist(questions.delete(key), lambda: not patience.lost)  # it was done meanwhile
        if patience.lost:
            raise LockLost(f"The lease ran out before the queue {name!r} had an item.")
        if patience.over:
            return None
        if not items:
            yield from _until_offered(name, rev, patience)


def finish(name: str, item: Item, lease: int, numbers: Numbers) -> Plan[None]:
    """Remove an item that was claimed. Raises LockLost where the claim is gone: somebody else may have it now."""
    key = claim_of(name, item)
    mine = [{"key": key, "op": "=", "value": lease}, {"key": item.key, "op": "=", "rev": item.rev}]
    done = yield from ask(questions.txn(mine, [{"op": "delete", "key": k} for k in (item.key, key)]), numbers)
    if not done.succeeded:
        raise LockLost(f"The claim on an item of the queue {name!r} ran out before it was done.")


def _unclaimed(name: str) -> Plan[tuple[list[Item], int]]:
    """The first few items of a queue that nobody works on, and the revision from which to wait where there are none."""
    claims, rev = yield from standing(f"{prefix_of('queue', name)}claim/")
    claimed = {item.key for item in claims}
    prefix = items_of(name)
    question: Question[ScanResult] | None = questions.scan(prefix, limit=QUEUE_PAGE + len(claimed))
    while question is not None:
        page = yield from ask(question)
        free = [item for item in numbered(page.items, prefix) if claim_of(name, item) not in claimed]
        if free:
            return free, rev
        question = questions.following(question, page)
    return [], rev


def _until_offered(name: str, rev: int, patience: Patience) -> Plan[None]:
    """Wait until an item has come, or a claim has gone, since revision `rev`."""
    items = items_of(name)

    def offers(event: Event) -> bool:
        if event.key.startswith(items):
            return event.kind == "put"
        return event.kind == "delete"  # of a claim

    try:
        yield Await(None, prefix_of("queue", name), rev + 1, patience.a_while(), offers)
    except Compacted:
        return  # looks again
