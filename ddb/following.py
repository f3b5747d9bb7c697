"""How a watch goes on for ever: which node to ask, from which revision on, and what was told already.

Laws:

1. Each change is told once and in order, whichever nodes tell it: a watch that moves asks from the last revision it saw,
   and passes over as many events of that one as it has told.
2. `Compacted` is given up with only when no node that answers keeps what is asked for, and those that don't answer have
   been waited for.
3. A node that is silent for longer than the protocol allows is dead.

Theory. As in calls.py nothing here touches a socket or a clock. A following is a generator of effects: `Connect`, then
`Receive` after `Receive`; `Told` hands what is new to whoever follows. All changes of a log entry have the same revision and
come in the same order from every node, so (revision, how many of it) is a position in the stream of changes that means
the same everywhere. A progress message says that everything up to its revision has been told.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from ddb import results, wire
from ddb.calls import BACKOFF_FIRST_S, BACKOFF_MAX_S, Failed, Knowledge, Sleep
from ddb.errors import BY_CODE, BadRequest, Compacted, DdbError, Internal, Unreachable
from ddb.results import Event

CONNECT_S: Final = 1.0
HEAD_FIRST_S: Final = 1.0
HEAD_MAX_S: Final = 8.0
SILENCE_S: Final = 8.0  # a node says something every 5 s


@dataclass(frozen=True, slots=True)
class Connect:
    """Open a new connection to the server at `address`, send `payload` as one frame, close the one before. `Failed` is
    thrown where that can't be done by `deadline_s`."""

    address: str
    payload: bytes
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Receive:
    """Answer with the payload of the next frame. `Failed` is thrown where none comes by `deadline_s`, or ever."""

    deadline_s: float


@dataclass(frozen=True, slots=True)
class Learn:
    """Learn anew where the nodes are, if anybody tells; an answer is welcome but not needed."""


@dataclass(frozen=True, slots=True)
class Told:
    """Hand on `event`, or, where it is None, the news that everything below the position has been told."""

    event: Event | None


Step = Connect | Receive | Sleep | Learn | Told
Steps = Generator[Step, bytes | None, None]


class Following:
    """A watch on its way: `request` is that of docs/protocol.md without `from`.

    `patience_s`: how long to look for a node that serves it at first, and for one that keeps what others have
    compacted. After it has begun, it looks for ever.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        request: dict[str, Any],
        from_rev: int | None,
        patience_s: float,
        now: Callable[[], float],
        rng: random.Random,
    ) -> None:
        self.next_rev = from_rev
        self._seen = 0  # how many events of `next_rev` have been told
        self._knowledge = knowledge
        self._request = request
        self._patience_s = patience_s
        self._head_s = HEAD_FIRST_S  # how long a node has to begin
        self._now = now
        self._rng = rng
        self._began = False
        self._failures: dict[str, DdbError] = {}

    @property
    def rev(self) -> int | None:
        """The revision up to which every change has been told, once it is known."""
        return None if self.next_rev is None else self.next_rev - (0 if self._seen else 1)

    def run(self) -> Steps:
        """Follow. Raises a DdbError where no node will ever serve it, or none did at first."""
        last = None
        trouble_s: float | None = self._now()
        pause_s = BACKOFF_FIRST_S
        while True:
            for address in self._order(last):
                last = address
                served = yield from self._follow(address)
                if served:
                    trouble_s, pause_s, self._head_s = None, BACKOFF_FIRST_S, HEAD_FIRST_S
                    self._failures.clear()
                    break
                trouble_s = self._now() if trouble_s is None else trouble_s
                if not self._began and self._now() - trouble_s > self._patience_s:
                    self._give_up(self._now() - trouble_s)
            else:
                trouble_s = self._now() if trouble_s is None else trouble_s
                self._give_up(self._now() - trouble_s)
                self._head_s = min(2 * self._head_s, HEAD_MAX_S)
                self._knowledge.turn("suspended")
                yield Sleep(self._rng.uniform(0, pause_s))
                pause_s = min(2 * pause_s, BACKOFF_MAX_S)
                self._failures.clear()
            yield Learn()

    def _order(self, last: str | None) -> list[str]:
        """All servers in an order of chance, the one that was followed last at the end."""
        servers = list(self._knowledge.servers)
        self._rng.shuffle(servers)
        return sorted(servers, key=lambda address: address == last)

    def _give_up(self, trouble_s: float) -> None:
        """Raise what must be raised after a round in which nobody served (law 2), `trouble_s` since the first one."""
        failures = list(self._failures.values())
        compacted = [error for error in failures if isinstance(error, Compacted)]
        all_said = len(compacted) == len(self._knowledge.servers)
        if compacted and (all_said or trouble_s > self._patience_s):
            raise min(compacted, key=lambda error: int(error.fields.get("oldest") or 0))
        if not self._began and trouble_s > self._patience_s:
            self._knowledge.turn("lost")
            raise failures[0] if failures else Unreachable("No node is known to watch at.")

    # ------------------------------------------------------------- one node

    def _follow(self, address: str) -> Generator[Step, bytes | None, bool]:
        """Follow at one node as long as it goes. Returns whether it served at all."""
        skip = self._seen
        begun = False
        request = {**self._request, "timeout": round(0.9 * self._head_s, 3)}
        if self.next_rev is not None:
            request["from"] = self.next_rev
        try:
            yield Connect(address, wire.encode(request), self._now() + CONNECT_S)
            head = yield from self._message(self._head_s)
            if head.get("ok") is not True:
                self._refuse(address, head)
            begun = self._began = True
            self._knowledge.turn("connected")
            if self.next_rev is None:
                self.next_rev = int(head["rev"]) + 1
            yield Told(None)
            while True:
                message = yield from self._message(SILENCE_S)
                if message.get("event") not in ("put", "delete", "progress"):
                    self._refuse(address, message)
                skip = yield from self._take(message, skip)
        except Failed as failure:
            self._failures[address] = Unreachable(f"{address} does not serve a watch ({failure.reason})")
        except (KeyError, TypeError, ValueError):
            self._failures[address] = Unreachable(f"{address} told something that is no change")
        except DdbError as error:
            if not (error.retry or isinstance(error, Compacted)):
                raise
            self._failures[address] = error
        return begun

    def _message(self, patience_s: float) -> Generator[Step, bytes | None, dict[str, Any]]:
        payload = yield Receive(self._now() + patience_s)
        assert payload is not None, "a driver answers Receive with bytes, or throws"
        try:
            message = wire.decode_trusted(payload)
        except BadRequest as error:
            raise Failed(str(error), sent=True) from None
        if not isinstance(message, dict):
            raise Failed("it answered something that is no message", sent=True)
        return message

    def _refuse(self, address: str, message: dict[str, Any]) -> NoReturn:
        """Raise what a refusal stands for, or the end of a stream."""
        if "error" not in message:
            raise Failed("it answered something that is no message", sent=True)
        text = str(message.get("message") or f"{address} ended a watch with {message.get('error')!r}.")
        fields = {name: value for name, value in message.items() if name in ("oldest", "leader")}
        raise BY_CODE.get(str(message.get("error")), Internal)(text, **fields)

    def _take(self, message: dict[str, Any], skip: int) -> Generator[Step, bytes | None, int]:
        """Hand on what is new in `message`; `skip` events of the revision asked from were told before (law 1)."""
        assert self.next_rev is not None
        rev = int(message["rev"])
        if message["event"] == "progress":
            if rev >= self.next_rev:
                self.next_rev, self._seen, skip = rev + 1, 0, 0
            yield Told(None)
        elif rev > self.next_rev or (rev == self.next_rev and not skip):
            event = results.event(message)
            self._seen = self._seen + 1 if rev == self.next_rev else 1
            self.next_rev = rev
            yield Told(event)
            return 0
        elif rev == self.next_rev:
            return skip - 1
        return skip
