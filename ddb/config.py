"""Settings that more than one floor needs, with their units in their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """The cluster's clockwork.

    A leader speaks at least every `heartbeat_s`. Who hears none for `election_timeout_s` holds an election, and a leader
    that a majority has not answered for as long steps down. `tick_s` is how often time is looked at.
    """

    tick_s: float = 0.025
    heartbeat_s: float = 0.1
    election_timeout_s: float = 0.75


@dataclass(frozen=True, slots=True)
class Bounds:
    """Nothing grows without end. What is full says `overloaded`."""

    append_bytes_max: int = 1 << 20  # of batches in one message to a follower, and of entries in a batch
    appends_in_flight_max: int = 4  # unacknowledged messages to one follower
    batches_in_flight_max: int = 2  # of the leader's, not yet committed: later writes gather in the next
    batch_entries_max: int = 4096
    writes_waiting_max: int = 100_000
    writes_waiting_bytes_max: int = 64 << 20  # of their entries; the commands that these say take as much memory again
    reads_waiting_max: int = 100_000
    snapshot_chunk_bytes: int = 256 << 10
