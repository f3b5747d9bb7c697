"""Checkpoints, and the snapshots that one member sends to another.

Laws:

* The log is only compacted behind a checkpoint whose own fsync has returned.
* A snapshot replaces nothing before its SHA-256, every row's checksum and the digest have been verified.
* While a snapshot is on its way, and for a while after, the log behind it is kept, so that it can take over where the
  snapshot ends.

Theory. A member whose log lags behind what the leader still has, or whose data proved wrong, is sent the leader's newest
checkpoint: one SQLite file, as it is on the leader's disk, in chunks, some of them in flight, acknowledged by the offset
up to which the file has been written (Raft §7). An acknowledgement that goes back asks for a restart; where none comes,
chunks are sent again. What is behind the checkpoint comes as log; only where that would be much is a new one made first.

What was written since a checkpoint began stays in memory until the next one is on disk. Where writes come quicker than the disk
takes checkpoints, that would grow without end, so the leader slows them down: in each twentieth of a second it lets them wait
for a share that grows with what has gathered, until both go at the same pace.

What takes long (hashing, writing what arrives, verifying that) runs in the `background`, a function `background(work, done)`
that calls `done(result, error)` on the loop; what nobody waits for, like a checkpoint, at `leisure`, another such
function; everything else is done on the loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from ddb import snapshot
from ddb.arrival import Arrival
from ddb.chronicle import Chronicle, Retention
from ddb.config import Bounds
from ddb.disk import Disk, OsDisk, remove_if_there
from ddb.errors import CorruptStore, ReadOnly, invariant
from ddb.inspection import Inspect
from ddb.kv import Machine
from ddb.layers import KeyFilter
from ddb.messages import Batch, InstallSnapshot, SnapshotReply, SnapshotRequest
from ddb.raft import Ready
from ddb.replica import Replica, Waiter
from ddb.segment import NO_ROOM
from ddb.store import Checkpoint, Store

log = logging.getLogger(__name__)

CHUNKS_IN_FLIGHT: Final = 48  # while the receiver's worker is at some rows, or at an fdatasync
CHUNKS_AT_ONCE: Final = 2  # in a turn: more would keep the loop from its other work
SEND_PATIENCE_S: Final = 60.0  # without an acknowledgement; the receiver verifies before the last one
FOLLOW_PATIENCE_S: Final = 60.0  # for a member to catch up behind its snapshot
RESEND_S: Final = 1.0  # a chunk, or its acknowledgement, may have found no connection to leave by
RETRY_S: Final = 5.0  # after a checkpoint that failed
REQUEST_EVERY_S: Final = 2.0
HOLD_PERIOD_S: Final = 0.05
NEWS_SHARE: Final = 0.25  # of what makes a checkpoint due: less is sent as log

Background = Callable[[Callable[[], Any], Callable[[Any, Exception | None], None]], None]


@dataclass(frozen=True, slots=True)
class Policy:
    """When to write a checkpoint, and how many entries before it the log keeps for followers that lag a little."""

    entries: int = 100_000
    bytes: int = 64 << 20
    retain_entries: int = 20_000
    retain_bytes: int = 64 << 20  # of history; what the log holds in memory has a bound of its own


@dataclass(slots=True)
class _Sending:
    """A copy on its way to one member."""

    next: int  # offset of the next chunk
    acknowledged: int
    deadline: float
    resend_at: float


@dataclass(slots=True)
class _Receiving:
    """A snapshot that is arriving."""

    src: str
    index: int
    file: Arrival
    received: int = 0  # given to the worker
    written: int = 0  # by it
    complete: bool = False

    def may_have(self, m: InstallSnapshot) -> bool:
        """Whether `m` is a chunk of this file, as far as anybody knows yet."""
        same = (self.src, self.index, self.file.size_bytes) == (m.src, m.index, m.size)
        return same and (not m.sha256 or self.file.sha256 in ("", m.sha256))


class Sync:
    """The snapshot's side of one member. `directory` is for copies and for what arrives, which `inspect` verifies (see Arrival)."""

    def __init__(
        self,
        replica: Replica,
        store: Store,
        directory: Path,
        background: Background,
        drop_log_below: Callable[[int], object],
        policy: Policy | None = None,
        bounds: Bounds | None = None,
        disk: Disk | None = None,
        leisure: Background | None = None,
        inspect: Inspect | None = None,
    ) -> None:
        self._disk = disk or OsDisk()
        self._inspect = inspect
        self._leisure = leisure or background
        self._replica = replica
        self._raft = replica.raft
        self._store = store
        self._background = background
        self._drop_log_below = drop_log_below
        self._policy = policy or Policy()
        self.chronicle = Chronicle(
            replica.machine.applied, Retention(self._policy.retain_entries, self._policy.retain_bytes), store
        )
        replica.machine.on_changes = self.chronicle.take
        replica.look_up = self.chronicle.answer
        self._chunk_bytes = (bounds or Bounds()).snapshot_chunk_bytes
        self._copy_path = directory / "outgoing.db"
        self._incoming_path = directory / "incoming.db"
        self._bytes_since = 0
        self._retry_at = 0.0
        self._request_at = 0.0
        self._begun: tuple[Checkpoint, int, Callable[[], None]] | None = None  # until its index is durable in the log
        self._checkpoint_waiters: list[tuple[int, Waiter]] = []  # each with the index that it wants on disk
        self._copy: snapshot.Source | None = None
        self._copying = False
        self._sparing = False
        self._at_work = 0  # jobs in the background that have the store's file open
        self._wanted_by: set[str] = set()
        self._wanted_index = 0  # a copy has what was applied when it was wanted; more would be a race with the writes
        self._sendings: dict[str, _Sending] = {}
        self._following: dict[str, float] = {}  # until when the log is kept for a member behind its snapshot
        self._now = 0.0
        self._receiving: _Receiving | None = None
        self._verified: tuple[snapshot.Meta, KeyFilter] | None = None  # received, waiting for a checkpoint to end
        for path in (self._copy_path, self._incoming_path):
            remove_if_there(self._disk, path)
        if not store.verified:
            self._in_store(store.verify, self._on_store_verified, self._leisure)

    # --- called by the replica and its node ---------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        """Whether something runs in the background, or is on its way."""
        return self._store.checkpointing or self._copying or bool(self._sendings) or self._receiving is not None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written to the file."""
        return self._store.checkpointing and self._begun is None

    def applied(self, batch: Batch) -> None:
        """See replica.Snapshots."""
        self._bytes_since += len(batch.data)

    def holds_writes(self, now: float) -> bool:
        """See replica.Snapshots: while a checkpoint is being written, what has changed since may take once the memory that makes
        one due, and from then on up to twice it more and more slowly."""
        if not self._store.checkpointing:
            return False
        excess = self._store.changed_bytes / self._policy.bytes - 1
        return excess > 0 and now % HOLD_PERIOD_S < excess * HOLD_PERIOD_S

    def work(self, ready: Ready, now: float) -> None:
        """See replica.Snapshots."""
        for peer in ready.needs_snapshot:
            self._wanted_by.add(peer)
            if self._needs_news(peer):
                self._wanted_index = self._replica.machine.applied
        if self._wanted_by:
            self._serve(now)
        for m in ready.chunks:
            if type(m) is InstallSnapshot:
                self._on_chunk(m)
            elif type(m) is SnapshotReply:
                self._on_acknowledged(m, now)
        for peer in sorted({m.src for m in ready.chunks if type(m) is SnapshotReply} & self._sendings.keys()):
            self._send_chunks(peer)

    def _needs_news(self, peer: str) -> bool:
        """Whether `peer` should get a checkpoint of now, and not the last one and what the log has behind it: that is quicker
        where it is not much. Where not its log lags, but its data are wrong, the snapshot has to reach as far as its log."""
        progress, policy = self._raft.progress.get(peer), self._policy
        if progress is None or not progress.snapshot:
            return True
        entries = self._replica.machine.applied - self._store.meta.applied
        return entries > policy.entries * NEWS_SHARE or self._bytes_since > policy.bytes * NEWS_SHARE

    def tick(self, now: float) -> None:
        """Let time pass."""
        self._now = now
        if self._begun is not None:
            self._write_checkpoint()
        policy = self._policy
        entries = self._replica.machine.applied - self._store.meta.applied
        if (entries >= policy.entries or self._bytes_since >= policy.bytes) and now >= self._retry_at:
            self.checkpoint(None, now)
        elif self._checkpoint_waiters:
            self.checkpoint(None, now)  # it could not be begun when it was asked for
        if self._sendings or self._wanted_by:
            self._tend_sendings(now)
        elif self._copy is not None:
            self._drop_copy()
        if self._replica.diverged and self._receiving is None and now >= self._request_at and self._raft.leader:
            self._request_at = now + REQUEST_EVERY_S
            self._replica.send(SnapshotRequest(self._raft.id, self._raft.leader, self._raft.term))

    def _tend_sendings(self, now: float) -> None:
        """Send again what was lost, and give up where that is of no use."""
        unhashed = self._copy is not None and not self._copy.sha256  # then they may be waiting for this node
        for peer in [p for p, sending in self._sendings.items() if now >= sending.deadline and not unhashed]:
            self._give_up(peer, "it has not answered")
        for peer, sending in self._sendings.items():
            if now >= sending.resend_at:
                self._send_again(peer, now)
        if not self._replica.is_leader:
            self._wanted_by.clear()
            for peer in list(self._sendings):
                self._give_up(peer, "this node does not lead any more")
        if self._copy is not None and not self._sendings and not self._wanted_by:
            self._drop_copy()

    def disconnected(self, peer: str) -> None:
        """The connection to `peer` broke; what was on its way has to be sent again."""
        if peer in self._wanted_by:
            self._wanted_by.discard(peer)
            self._raft.snapshot_failed(peer)
        if peer in self._sendings:
            self._give_up(peer, "its connection broke")
        if self._receiving is not None and self._receiving.src == peer and not self._receiving.complete:
            self._stop_receiving()

    def checkpoint(self, waiter: Waiter | None, now: float) -> None:
        """Write a checkpoint now; `waiter` gets its `rev`. Does nothing more where one is under way already, or can't be begun yet."""
        applied, store = self._replica.machine.applied, self._store
        if waiter is not None:
            self._checkpoint_waiters.append((applied, waiter))
        if store.checkpointing or self._replica.diverged or self._verified is not None:
            return
        if applied == store.meta.applied:
            self._tell_checkpoint_waiters(None)
            return
        self._spare_file()
        term = self._raft.log.term_at(applied)
        invariant(term is not None, "the log still has the last applied entry")
        bytes_before, self._bytes_since = self._bytes_since, 0
        extract = self.chronicle.extract(applied)
        checkpoint = store.begin_checkpoint(applied, term or 0, self._raft.config_at(applied), extract)

        def done(_: object, error: Exception | None) -> None:
            if error is None:
                store.finish_checkpoint(checkpoint)
                self._compact()
            elif isinstance(error, ReadOnly):
                log.error("%r: the checkpoint failed: %s", self._replica, error)
                store.abandon_checkpoint(checkpoint)
                self._bytes_since += bytes_before
                self._retry_at = now + RETRY_S
            else:  # a failed fsync is never retried: nobody knows what the disk holds now
                raise error
            self._tell_checkpoint_waiters(error)

        self._begun = (checkpoint, applied, lambda: self._in_store(checkpoint.write, done, self._leisure))
        self._write_checkpoint()

    def _write_checkpoint(self) -> None:
        """The snapshot must never know more than the log on this disk: what was begun is written when that has caught up.
        (Beginning only when it has might mean never, on a disk that is always a little behind.)"""
        if self._begun is not None and self._raft.durable >= self._begun[1]:
            (_, _, write), self._begun = self._begun, None
            write()

    def close(self) -> None:
        """Let go of the files, and wait for no work on them. May be called twice."""
        self._store.end_work()
        self._drop_copy()
        self._stop_receiving()

    # --- the store's file ---------------------------------------------------------------------------------------

    def _in_store(
        self, work: Callable[[], Any], done: Callable[[Any, Exception | None], None], run: Background
    ) -> None:
        """Have `run` do `work`, which opens the store's file. The file is not replaced meanwhile."""
        self._at_work += 1

        def ended(result: Any, error: Exception | None) -> None:
            self._at_work -= 1
            done(result, error)
            if self._verified is not None and not self._at_work:
                self._install()

        run(work, ended)

    def _on_store_verified(self, _: object, error: Exception | None) -> None:
        if isinstance(error, CorruptStore):
            self._replica.distrust(error.message)
        elif error is not None:
            log.warning("%r: the snapshot could not be verified: %s", self._replica, error)

    # --- checkpoints --------------------------------------------------------------------------------------------

    def _tell_checkpoint_waiters(self, error: Exception | None) -> None:
        waiters, self._checkpoint_waiters = self._checkpoint_waiters, []
        for index, waiter in waiters:
            if error is None and index > self._store.meta.applied:
                # This one had begun before it asked: the next tick will do.
                self._checkpoint_waiters.append((index, waiter))
            elif error is None:
                waiter.reply(b'{"ok":true,"rev":%d}' % self._store.meta.applied)
            else:
                waiter.fail(ReadOnly(f"The checkpoint failed: {error}"))

    def _compact(self) -> None:
        """Drop what the checkpoint covers from the log, but for a tail, and for what a snapshot on its way will need. The
        tail is so many entries, and no more than the log holds in memory: a few thousand large ones would make every
        start read hundreds of megabytes."""
        applied = self._store.meta.applied
        upto = max(applied - self._policy.retain_entries, min(applied, self._raft.log.let_go))
        if self._copying or self._wanted_by:
            return  # whoever gets the copy will need what follows it; the next checkpoint will do
        if self._copy is not None:
            upto = min(upto, self._copy.meta.applied)
        upto = min(upto, self._followed_from(upto))
        if upto > self._raft.log.base_index:
            self._raft.compact(upto)
            base = self._raft.log.base_index
            self._leisure(lambda: self._drop_log_below(base), self._dropped)

    def _followed_from(self, upto: int) -> int:
        """Where the log has to begin for those who have installed a snapshot and follow now, more slowly than others write,
        perhaps: without it they would need the next snapshot before they are behind the last one. At most `upto`."""
        for peer, until in list(self._following.items()):
            progress = self._raft.progress.get(peer)
            if progress is None or progress.match >= upto or self._now >= until:
                del self._following[peer]
            else:
                upto = progress.match
        return upto

    def _dropped(self, _: object, error: Exception | None) -> None:
        if error is not None:
            log.warning("%r: old log segments could not be removed: %s", self._replica, error)

    # --- sending ------------------------------------------------------------------------------------------------

    def _serve(self, now: float) -> None:
        """Send the copy to those who want it; make one first where there is none, from a fresh checkpoint."""
        if self._copy is not None:
            for peer in sorted(self._wanted_by):
                if peer not in self._sendings:
                    log.info("%r: sending the snapshot of %d to %s", self._replica, self._copy.meta.applied, peer)
                    self._sendings[peer] = _Sending(0, 0, now + SEND_PATIENCE_S, now + RESEND_S)
                    self._send_chunks(peer)
            self._wanted_by.clear()
        elif not (self._copying or self._sparing or self._store.checkpointing):
            if self._store.meta.applied < max(self._wanted_index, 1) and now >= self._retry_at:
                self.checkpoint(None, now)
            elif self._store.meta.applied:
                self._copying = True
                self._in_store(lambda: self._store.source(self._copy_path), self._copied, self._background)

    def _copied(self, copy: snapshot.Source | None, error: Exception | None) -> None:
        self._copying = False
        if copy is None:
            log.error("%r: no copy of the snapshot could be made: %s", self._replica, error)
            for peer in self._wanted_by:
                self._raft.snapshot_failed(peer)
            self._wanted_by.clear()
            return
        self._copy = copy
        if not copy.sha256:
            self._in_store(lambda: snapshot.hashed(copy), partial(self._hashed, copy), self._background)

    def _hashed(self, copy: snapshot.Source, sha256: str | None, error: Exception | None) -> None:
        """The last chunk, which has waited for that, may go."""
        if copy is not self._copy:
            copy.close()  # `_drop_copy` has left that, for somebody was reading
        elif sha256 is None:
            log.error("%r: the snapshot could not be read: %s", self._replica, error)
            for peer in list(self._sendings):
                self._give_up(peer, "it could not be read")
            self._copy = None
            copy.close()
        else:
            self._copy = replace(copy, sha256=sha256)
            for peer in sorted(self._sendings):
                self._sendings[peer].deadline = self._now + SEND_PATIENCE_S
                self._send_chunks(peer)

    def _spare_file(self) -> None:
        """Go on from a copy where the sending takes longer than from one checkpoint to the next: what waits in the write-ahead
        log of the database, because its file is being sent, would grow without end."""
        source = self._copy
        if (
            source is None
            or not source.still
            or not source.sha256
            or self._sparing
            or not self._store.waiting_checkpoints
        ):
            return

        def spared(copy: snapshot.Source | None, error: Exception | None) -> None:
            self._sparing = False
            if copy is None:
                log.error("%r: no copy of the snapshot could be made: %s", self._replica, error)
            elif self._copy is source:
                self._copy = copy
                source.close()
            else:
                copy.close()

        self._sparing = True
        self._in_store(lambda: snapshot.spared(self._disk, source, self._copy_path), spared, self._leisure)

    def _send_chunks(self, peer: str) -> None:
        sending, copy = self._sendings[peer], self._copy
        if not self._replica.is_leader:
            return  # the term that has come is another's: a chunk in its name would pass for its leader's word
        if copy is None:
            return
        window_end = sending.acknowledged + CHUNKS_IN_FLIGHT * self._chunk_bytes
        for _ in range(CHUNKS_AT_ONCE):
            if sending.next >= min(window_end, copy.size_bytes):
                return
            if not copy.sha256 and sending.next + self._chunk_bytes >= copy.size_bytes:
                return  # the last one says what the whole must be
            data = copy.read(self._chunk_bytes, sending.next)
            meta, raft = copy.meta, self._raft
            self._replica.send(
                InstallSnapshot(
                    raft.id, peer, raft.term, meta.applied, meta.term, sending.next, copy.size_bytes, copy.sha256, data
                )
            )  # fmt: skip
            sending.next += len(data)

    def _send_again(self, peer: str, now: float) -> None:
        """Ask a member that has been silent how far it is: from the last chunk that it has, or at least of the last byte."""
        sending = self._sendings[peer]
        sending.resend_at = now + RESEND_S
        if self._copy is not None:
            sending.next = min(sending.acknowledged, self._copy.size_bytes - 1)
            self._send_chunks(peer)

    def _on_acknowledged(self, m: SnapshotReply, now: float) -> None:
        sending, copy = self._sendings.get(m.src), self._copy
        if sending is None or copy is None or m.index != copy.meta.applied:
            return
        sending.deadline, sending.resend_at = now + SEND_PATIENCE_S, now + RESEND_S
        if m.installed:
            log.info("%r: %s has installed the snapshot of %d", self._replica, m.src, m.index)
            del self._sendings[m.src]
            self._following[m.src] = now + FOLLOW_PATIENCE_S
            self._raft.snapshot_sent(m.src, m.index)
            self._drop_idle_copy()
            return
        if m.offset < sending.acknowledged:
            sending.next = m.offset  # it begins anew
        sending.acknowledged = m.offset

    def _give_up(self, peer: str, why: str) -> None:
        log.warning("%r: the snapshot for %s is given up: %s", self._replica, peer, why)
        del self._sendings[peer]
        self._raft.snapshot_failed(peer)
        self._drop_idle_copy()

    def _drop_idle_copy(self) -> None:
        if not self._sendings:
            self._drop_copy()

    def _drop_copy(self) -> None:
        copy, self._copy = self._copy, None
        if copy is not None and copy.sha256:
            copy.close()

    # --- receiving ----------------------------------------------------------------------------------------------

    def _on_chunk(self, m: InstallSnapshot) -> None:
        receiving = self._receiving
        if self._is_useless(m.index):
            self._acknowledge(m.src, m.index, m.size, installed=True)
            return
        if receiving is None or not receiving.may_have(m):
            if receiving is not None and receiving.complete:
                return  # one is being verified; the sender will try again
            self._stop_receiving()
            log.info("%r: receiving the snapshot of %d, %d bytes", self._replica, m.index, m.size)
            file = Arrival(self._disk, self._incoming_path, m.size, m.sha256, self._inspect)
            self._receiving = receiving = _Receiving(m.src, m.index, file)
        receiving.file.sha256 = m.sha256 or receiving.file.sha256
        if m.offset == receiving.received and not receiving.complete:
            self._write(receiving, m.data, m.offset)
        else:
            self._acknowledge(m.src, m.index, receiving.written)

    def _write(self, receiving: _Receiving, data: bytes, offset: int) -> None:
        """Have the worker write a chunk. It is acknowledged when that is done, so the sender's window is the bound of what
        waits here."""
        receiving.received += len(data)

        def written(upto: int | None, error: Exception | None) -> None:
            if receiving is self._receiving:
                self._on_written(receiving, upto, error)

        self._background(lambda: receiving.file.take(data, offset), written)

    def _on_written(self, receiving: _Receiving, upto: int | None, error: Exception | None) -> None:
        if upto is None:
            receiving.received = receiving.written  # a chunk that is not acknowledged is sent again
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                log.error("%r: there is no room for the leader's snapshot; free some, and it goes on", self._replica)
            elif isinstance(error, CorruptStore):
                self._refuse(error)
            elif error is not None:
                raise error
            return
        receiving.written = upto
        self._acknowledge(receiving.src, receiving.index, upto)
        if upto >= receiving.file.size_bytes and not receiving.complete:
            receiving.complete = True
            self._background(receiving.file.finish, self._on_verified)

    def _is_useless(self, index: int) -> bool:
        """Whether the state of `index` would bring nothing that is not here."""
        return index <= self._raft.commit and not self._replica.diverged

    def _acknowledge(self, to: str, index: int, offset: int, installed: bool = False) -> None:
        message = SnapshotReply(self._raft.id, to, self._raft.term, index, offset, installed)
        if self._raft.term_is_durable:
            self._replica.send(message)
        else:
            self._raft.send(message)  # which keeps it until then

    def _on_verified(self, found: tuple[snapshot.Meta, KeyFilter] | None, error: Exception | None) -> None:
        receiving = self._receiving
        if receiving is None:
            return
        meta = None if found is None else found[0]
        if meta is None or meta.applied != receiving.index or meta.configuration is None:
            self._refuse(error)
            return
        self._verified = found
        if not self._at_work:
            self._install()

    def _refuse(self, error: Exception | None) -> None:
        log.error("%r: the snapshot received is of no use: %s", self._replica, error or "it is another one")
        self._stop_receiving()

    def _install(self) -> None:
        """Put the verified snapshot in the state's place, and let the log go on behind it."""
        verified, receiving = self._verified, self._receiving
        self._verified = None
        if verified is None or receiving is None:
            return
        meta, keys = verified
        if meta.configuration is None:
            return
        raft = self._raft
        fits = meta.applied > raft.commit or raft.log.base_index <= meta.applied
        for peer in list(self._sendings):
            self._give_up(peer, "what it was sent is replaced")
        self._drop_copy()  # it keeps the file as it is
        if not self._is_useless(meta.applied) and fits:
            if self._begun is not None:
                self._store.abandon_checkpoint(self._begun[0])
                self._begun = None
            self._store.install(self._incoming_path, keys)
            self._bytes_since = 0
            if meta.applied > raft.commit:
                raft.restore(meta.applied, meta.term, meta.configuration)
            else:
                raft.reapply(meta.applied)
            self.chronicle.reset(meta.applied, self._store)
            machine = Machine(self._store, meta.applied)
            machine.on_changes = self.chronicle.take
            self._replica.restored(machine)
            log.info("%r: installed the snapshot of %d", self._replica, meta.applied)
        self._stop_receiving()
        self._acknowledge(receiving.src, meta.applied, receiving.file.size_bytes, installed=True)

    def _stop_receiving(self) -> None:
        receiving, self._receiving = self._receiving, None
        if receiving is not None:
            self._verified = None
            self._background(receiving.file.drop, self._on_dropped)

    def _on_dropped(self, _: object, error: Exception | None) -> None:
        if error is not None:
            log.warning("%r: %s could not be removed: %s", self._replica, self._incoming_path, error)
