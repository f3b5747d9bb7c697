"""A node's data directory: whose it is, and that only one process uses it.

    identity.json   the node's id and its cluster's; made with the directory
    log/            the log (log.py)
    state.db        the snapshot (store.py)
    lock            held while a process uses the directory

Laws: the id is made once, with the directory, so a wiped disk is a new member and never votes with the old one's
right (messages.Member). Every change is written beside, fsynced and renamed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ddb.disk import Disk, OsDisk, read_file, replace_durably
from ddb.errors import StartupError


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a node is. `founding` is the configuration of a cluster that this node was granted to begin, and `at` when,
    until that stands in its log. `born`: the log has been made, so one that is missing later was lost. `members` are the
    ids of the members, as the log named them last: should it lose its end, that must not be forgotten with it (raft.py,
    unanimity)."""

    id: str
    cluster: str | None = None
    founding: dict[str, Any] | None = None
    born: bool = False
    members: tuple[str, ...] = ()


class DataDirectory:
    """An open data directory. Made by `DataDirectory.open`; `close()` may be called twice."""

    def __init__(self, path: Path, disk: Disk, lock: int, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        self._disk = disk
        self._lock: int | None = lock

    @classmethod
    def open(
        cls, path: Path, *, disk: Disk | None = None, new_id: Callable[[], str] = lambda: str(uuid.uuid4())
    ) -> DataDirectory:
        """Lock the directory `path`, made if it is not there, and read the identity, or make one with `new_id()`.

        Raises StartupError where it can't be written, is in use, or holds something else.
        """
        disk = disk or OsDisk()
        try:
            disk.make_directory(path)
            lock = disk.lock(path / "lock")
        except BlockingIOError:
            raise StartupError(
                f"The data directory {path} is in use by another process; give each node its own."
            ) from None
        except OSError as error:
            raise StartupError(f"The data directory {path} can't be used: {error.strerror}.") from error
        try:
            directory = cls(path, disk, lock, _read_identity(path, disk, new_id))
            directory.save(directory.identity)
            return directory
        except BaseException:
            disk.close(lock)
            raise

    @property
    def log_path(self) -> Path:
        """Where the log is."""
        return self.path / "log"

    @property
    def store_path(self) -> Path:
        """Where the snapshot is."""
        return self.path / "state.db"

    def change(self, **fields: Any) -> None:
        """Change these fields of the identity, durably. Raises StartupError where the disk refuses."""
        changed = replace(self.identity, **fields)
        if changed != self.identity:
            self.save(changed)

    def save(self, identity: Identity) -> None:
        """Make `identity` the directory's, durably."""
        text = json.dumps({field.name: getattr(identity, field.name) for field in fields(identity)}, indent=1)
        try:
            replace_durably(self._disk, self.path / "identity.json", text.encode())
        except OSError as error:
            raise StartupError(f"The data directory {self.path} can't be written: {error.strerror}.") from error
        self.identity = identity

    def close(self) -> None:
        """Let another process use it."""
        if self._lock is not None:
            self._disk.close(self._lock)
            self._lock = None


def _read_identity(path: Path, disk: Disk, new_id: Callable[[], str]) -> Identity:
    try:
        text = read_file(disk, path / "identity.json").decode()
    except FileNotFoundError:
        if disk.exists(path / "log") or disk.exists(path / "state.db"):
            raise StartupError(
                f"{path} holds data but no identity.json; restore that, or start in an empty directory."
            ) from None
        return Identity(new_id())
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path / 'identity.json'} can't be read: {error}.") from error
    try:
        fields = json.loads(text)
        identity = Identity(**{**fields, "members": tuple(fields.get("members", ()))})
        if type(identity.id) is not str or not identity.id:
            raise ValueError("no id")
    except (TypeError, ValueError) as error:
        file = path / "identity.json"
        raise StartupError(
            f"{file} is not a node's identity ({error}); restore it, or start in an empty directory."
        ) from error
    if identity.born and not disk.exists(path / "log"):
        raise StartupError(
            f"The log of {path} is missing; without it this node can't know what it promised. "
            "Restore it, or remove the directory to join as a new member."
        )
    return identity
