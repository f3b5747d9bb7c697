"""A node's data directory: whose it is, and that only one process uses it.

    identity.json   the node's id and its cluster's; made with the directory
    log/            the log (log.py)
    state.db        the snapshot (store.py)
    lock            held while a process uses the directory

Laws: the id is made once, with the directory, so a wiped disk is a new member and never votes with the old one's
right (messages.Member). Every change is written beside, fsynced and renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ddb.errors import StartupError


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a node is. `founding` is the configuration of a cluster that this node was granted to begin, until that stands in
    its log. `born`: the log has been made, so one that is missing later was lost."""

    id: str
    cluster: str | None = None
    founding: dict[str, Any] | None = None
    born: bool = False


class DataDirectory:
    """An open data directory. Made by `DataDirectory.open`; `close()` may be called twice."""

    def __init__(self, path: Path, lock: int, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        self._lock: int | None = lock

    @classmethod
    def open(cls, path: Path) -> DataDirectory:
        """Lock the directory `path`, made if it is not there, and read or make the identity.

        Raises StartupError where it can't be written, is in use, or holds something else.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StartupError(f"The data directory {path} can't be used: {error.strerror}.") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise StartupError(
                f"The data directory {path} is in use by another process; give each node its own."
            ) from None
        try:
            directory = cls(path, lock, _read_identity(path))
            directory.save(directory.identity)
            return directory
        except BaseException:
            os.close(lock)
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
        self.save(replace(self.identity, **fields))

    def save(self, identity: Identity) -> None:
        """Make `identity` the directory's, durably."""
        path = self.path / "identity.json"
        temporary = path.with_suffix(".new")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(asdict(identity), file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            handle = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise StartupError(f"The data directory {self.path} can't be written: {error.strerror}.") from error
        self.identity = identity

    def close(self) -> None:
        """Let another process use it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _read_identity(path: Path) -> Identity:
    try:
        text = (path / "identity.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        if (path / "log").exists() or (path / "state.db").exists():
            raise StartupError(
                f"{path} holds data but no identity.json; restore that, or start in an empty directory."
            ) from None
        return Identity(str(uuid.uuid4()))
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"{path / 'identity.json'} can't be read: {error}.") from error
    try:
        identity = Identity(**json.loads(text))
        if type(identity.id) is not str or not identity.id:
            raise ValueError("no id")
    except (TypeError, ValueError) as error:
        file = path / "identity.json"
        raise StartupError(
            f"{file} is not a node's identity ({error}); restore it, or start in an empty directory."
        ) from error
    if identity.born and not (path / "log").exists():
        raise StartupError(
            f"The log of {path} is missing; without it this node can't know what it promised. "
            "Restore it, or remove the directory to join as a new member."
        )
    return identity
