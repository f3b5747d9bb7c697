"""Bugs of watches and history: changes that are left out, told twice, or too early."""

from __future__ import annotations

from tests.mutants.planting import Mutant, mutant

CHRONICLE = "ddb.chronicle:Chronicle."
WATCHING = "ddb.watchers:Watching."
STORE = "ddb.store:Store."
PAST = "test_chronicle.py::"
TOLD = "test_watchers.py::"

WATCHING_BUGS: list[Mutant] = [
    mutant(
        "only a leader tells its watchers",
        "what a follower applies is told to nobody who watches there, and is lost when another node leads",
        WATCHING + "turn",
        "for page in pages:",
        "for page in pages if self._replica.is_leader else ():",
    ),
    mutant(
        "a member forgets its watchers with a snapshot",
        "behind an installed snapshot, nothing that the machine applies reaches the chronicle",
        "ddb.sync:Sync._install",
        "machine.on_changes = self.chronicle.take",
        "pass",
    ),
    mutant(
        "watchers stay live while a snapshot is installed",
        "the changes between the old state and the new one are told to nobody",
        WATCHING + "_on_reset",
        "if watcher.live and not watcher.gone:",
        "if False:",
    ),
    mutant(
        "changes without room are let go of",
        "a watcher that is slow for a moment misses what came meanwhile",
        WATCHING + "_fall_behind",
        "watcher.live = False",
        "pass",
        claim=TOLD + "test_what_comes_while_there_is_no_room_is_told_when_there_is",
    ),
    mutant(
        "a change is told again on resumption",
        "a watch from a revision on begins with the one before it",
        WATCHING + "_begin",
        "max(wanted.first, 1) - 1",
        "max(wanted.first, 2) - 2",
        claim=TOLD + "test_a_watch_from_a_revision_begins_at_once_and_includes_it",
    ),
    mutant(
        "what was read from the chronicle is handed round, too",
        "a watcher that has just caught up is told the last changes twice",
        WATCHING + "_hand_round",
        "if watcher.seen < rev:",
        "if True:",
        claim=TOLD + "test_what_was_read_from_the_chronicle_is_not_handed_round_again",
    ),
    mutant(
        "file and memory overlap",
        "what a checkpoint has and memory has as well is told from both, the older behind the newer",
        CHRONICLE + "records",
        "self._read(after, self.base, start, end, reverse=False)",
        "self._read(after, self.past.history_last, start, end, reverse=False)",
        claim=PAST + "test_at_least_the_last_entries_are_kept_through_checkpoints_and_restarts",
    ),
    mutant(
        "compacted is not told",
        "a watch from a revision that is gone begins where the chronicle does, and says nothing",
        WATCHING + "_begin",
        "if seen < self._chronicle.floor:",
        "if False:",
        WATCHING + "_catch_up",
        "if watcher.seen < chronicle.floor:",
        "if False:",
        claim=TOLD + "test_what_is_gone_is_compacted_with_the_oldest",
    ),
    mutant(
        "a gap in history is not noticed",
        "what the file has before entries that memory had to forget counts as whole",
        CHRONICLE + "floor",
        "past.history_floor < self.base <= past.history_last",
        "past.history_floor < self.base",
        claim=PAST + "test_a_gap_makes_the_file_count_no_more",
    ),
    mutant(
        "a chapter is read from a file that has just forgotten it",
        "a worker's checkpoint drops the oldest between two chapters, and the reader goes on behind the gap",
        STORE + "_chapter",
        "if after < floor:",
        "if False:",
        claim=PAST + "test_who_reads_while_a_checkpoint_drops_the_oldest_is_told",
    ),
    mutant(
        "history is not in the snapshot",
        "a checkpoint takes up nothing of the chronicle, so a restart forgets what has happened",
        "ddb.sync:Sync.checkpoint",
        "extract = self.chronicle.extract(applied)",
        "extract = None",
        claim="test_sync.py::test_a_checkpoint_takes_history_along_and_a_snapshot_brings_it",
    ),
    mutant(
        "changes of one revision overwrite one another on disk",
        "of an entry whose changes don't fit into a chapter the file keeps the last ones",
        "ddb.annals:_chapters",
        "if size >= bytes_max and rev != last:",
        "if size >= bytes_max:",
        claim=PAST + "test_a_revision_is_never_split_between_file_and_memory",
    ),
    mutant(
        "a prefix misses the key that equals it",
        "who watches the prefix a is not told of the key a",
        "ddb.watches:Watches.find",
        "if length > most:",
        "if length >= most:",
        claim=TOLD + "test_the_index_finds_whom_a_search_through_all_would",
    ),
    mutant(
        "a short key is found under a longer prefix again",
        "who watches a prefix is told twice of a key that is shorter than another's prefix",
        "ddb.watches:Watches.find",
        "if length > most:\n            break",
        "pass",
        claim=TOLD + "test_the_index_finds_whom_a_search_through_all_would",
    ),
    mutant(
        "a revision is split where a turn ends",
        "of an entry's changes, those are lost that a watcher would have been told in its next turn",
        WATCHING + "_catch_up",
        "if rev != seen and (looked_at >= RECORDS_A_TURN or size >= STREAM_BYTES_MAX):",
        "if looked_at >= RECORDS_A_TURN or size >= STREAM_BYTES_MAX:",
        claim=TOLD + "test_a_turn_never_ends_within_a_revision",
    ),
    mutant(
        "progress ahead of the events",
        "a watcher hears that all was told up to a revision whose changes it gets afterwards",
        WATCHING + "tick",
        "if watcher.live and watcher.stream.has_room:",
        "if True:",
        claim=TOLD + "test_nothing_is_sent_before_the_replies_that_come_first",
    ),
    mutant(
        "progress before the pages of this turn",
        "what was applied and not handed round yet counts as told",
        WATCHING + "tick",
        "self.turn()",
        "pass",
        claim=TOLD + "test_progress_waits_for_what_was_applied_in_this_turn",
    ),
    mutant(
        "a watch begins without confirmation",
        "a member that lags tells its new watchers what was acknowledged long before they asked",
        WATCHING + "watch",
        "self._replica.read(NOTHING, _Confirmed(slot, lambda: self._begin(wanted, slot)))",
        "self._begin(wanted, slot)",
        claim=TOLD + "test_a_watch_without_from_begins_where_the_confirmation_finds_the_node",
    ),
    mutant(
        "a slow watcher is never dropped",
        "who does not read is waited for until the chronicle is gone",
        WATCHING + "_fall_behind",
        "if watcher.behind_bytes > BEHIND_BYTES_MAX:",
        "if False:",
        claim=TOLD + "test_a_slow_watcher_is_dropped_with_a_sentence_and_others_are_served",
    ),
    mutant(
        "an id on each event of a revision",
        "a browser that resumes behind the first change of a transaction never gets the second",
        "ddb.streams:Stream.send",
        "last = number == following or events[number].rev != event.rev",
        "last = True",
        claim=TOLD + "test_only_the_last_event_of_a_revision_carries_its_id",
    ),
]
