"""Leases: keys that go when their owner does.

Laws:

* A lease ends only by an entry of the log: revoked by a client, or expired by the leader. No clock is read here.
* With a lease go all keys attached to it, in that one entry.
* A key is attached to one lease or to none. A put says which; a delete detaches; an `incr` leaves it as it is.
* Bounded: leases, and keys of a lease, for all of these go in one entry.

Theory. Here stand only the facts that every node agrees about: which leases there are, for how long each was
granted, and which keys hang on it. How much of that time is left is known to the leader alone (tenure.py).

A lease's id is the revision of the entry that granted it, so no id is ever given twice.
"""

from __future__ import annotations

from typing import Final

from ddb.errors import BadRequest, Overloaded, TooLarge
from ddb.ledger import Ledger

LEASES_MAX: Final = 100_000
KEYS_MAX: Final = 10_000  # attached to one lease

_KIND: Final = "lease/"
_KEY_KIND: Final = "leased/"


class Leases:
    """All leases, kept in `ledger`.

    `ttl_ms` is each lease's time to live, by id, in the order of these; `of` the lease of each attached key. `granted` are the leases that
    were granted since somebody last cleared it: whoever counts their time begins with these.
    """

    __slots__ = ("_keys", "_ledger", "granted", "of", "ttl_ms")

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._keys: dict[int, set[str]] = {}
        self.ttl_ms: dict[int, int] = {}
        self.of: dict[str, int] = {}
        self.granted: set[int] = set()
        for name, value in ledger.records.items():
            if name.startswith(_KIND):
                self.ttl_ms[int(name[len(_KIND) :])] = int(value)
                continue
            if name.startswith(_KEY_KIND):
                key, lease = name[len(_KEY_KIND) :], int(value)
                self.of[key] = lease
                self._keys.setdefault(lease, set()).add(key)
        self.ttl_ms = dict(sorted(self.ttl_ms.items()))  # as they are granted: a later one has a higher number

    def __len__(self) -> int:
        return len(self.ttl_ms)

    def grant(self, rev: int, ttl_ms: int) -> None:
        """Grant a lease, whose id is `rev`. Raises Overloaded."""
        if len(self.ttl_ms) >= LEASES_MAX:
            raise Overloaded(f"There are {LEASES_MAX} leases already; revoke some, or wait until they expire.")
        self.ttl_ms[rev] = ttl_ms
        self.granted.add(rev)
        self._ledger.set(f"{_KIND}{rev}", b"%d" % ttl_ms)

    def require(self, lease: int) -> None:
        """Raise BadRequest, which names the lease in its fields, where there is no such lease (any more)."""
        if lease not in self.ttl_ms:
            raise unknown_lease(lease)

    def end(self, lease: int) -> list[str]:
        """Forget a lease, which is there. Returns the keys that were attached to it, in order; they are to be deleted."""
        del self.ttl_ms[lease]
        self.granted.discard(lease)
        self._ledger.set(f"{_KIND}{lease}", None)
        keys = self.keys(lease)
        for key in keys:
            self.attach(key, 0)
        return keys

    def keys(self, lease: int) -> list[str]:
        """The keys attached to `lease`, in order."""
        return sorted(self._keys.get(lease, ()))

    def key_count(self, lease: int) -> int:
        """How many keys are attached to `lease`."""
        return len(self._keys.get(lease, ()))

    def attach(self, key: str, lease: int) -> int:
        """Attach `key` to `lease`; 0 detaches it. Returns what it was attached to. Raises TooLarge."""
        old = self.of.get(key, 0)
        if old == lease:
            return old
        if lease:
            keys = self._keys.setdefault(lease, set())
            if len(keys) >= KEYS_MAX:
                raise TooLarge(f"Lease {lease} has {KEYS_MAX} keys already; grant another for more.")
            keys.add(key)
            self.of[key] = lease
            self._ledger.set(_KEY_KIND + key, b"%d" % lease)
        else:
            del self.of[key]
            self._ledger.set(_KEY_KIND + key, None)
        if old:
            self._keys[old].discard(key)
            if not self._keys[old]:
                del self._keys[old]
        return old


def unknown_lease(lease: int) -> BadRequest:
    """The failure of whoever names a lease that is not there."""
    return BadRequest(f"There is no lease {lease} (any more); grant one with lease_grant.", lease=lease)


def ttl_json(ttl_ms: int) -> bytes:
    """A time to live in seconds, as replies say it."""
    return b"%d" % (ttl_ms // 1000) if ttl_ms % 1000 == 0 else repr(ttl_ms / 1000).encode()
