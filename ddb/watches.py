"""Who watches what: an index from a key to its watchers.

Laws: a change that nobody watches costs one look for its key and one for each length that a watched prefix has and the key
reaches, however many watchers there are. Watchers are found in the order in which they came, so that a run can be
repeated.

Theory. Those who watch one key stand in a dict by that key, those who watch a prefix in another by the prefix. Whether
some prefix of a key is watched is asked length by length, so what counts is how many different lengths are in use: few, as
people name their keys; and never more than the key has characters.
"""

from __future__ import annotations

from collections import Counter
from typing import Generic, TypeVar

W = TypeVar("W")


class Watches(Generic[W]):
    """The index. A watcher stands in it once, and may be anything that can be a dict's key."""

    __slots__ = ("_counts", "_keys", "_lengths", "_prefixes")

    def __init__(self) -> None:
        self._keys: dict[str, dict[W, None]] = {}
        self._prefixes: dict[str, dict[W, None]] = {}
        self._counts: Counter[int] = Counter()  # watched prefixes, by their length
        self._lengths: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._keys or self._prefixes)

    def add(self, watcher: W, name: str, *, prefix: bool) -> None:
        """`watcher` wants the changes of the key `name`, or of all keys that begin with it."""
        places = self._prefixes if prefix else self._keys
        if name not in places:
            places[name] = {}
            if prefix:
                self._count(len(name), 1)
        places[name][watcher] = None

    def remove(self, watcher: W, name: str, *, prefix: bool) -> None:
        """Undo an `add`."""
        places = self._prefixes if prefix else self._keys
        del places[name][watcher]
        if not places[name]:
            del places[name]
            if prefix:
                self._count(len(name), -1)

    def find(self, key: str) -> list[W]:
        """Everybody who watches `key`, each once."""
        exact = self._keys.get(key)
        found = list(exact) if exact is not None else []
        most = len(key)
        for length in self._lengths:
            if length > most:
                break
            watchers = self._prefixes.get(key[:length])
            if watchers is not None:
                found += watchers
        return found

    def _count(self, length: int, change: int) -> None:
        self._counts[length] += change
        if not self._counts[length]:
            del self._counts[length]
        self._lengths = sorted(self._counts)
