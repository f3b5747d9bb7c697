"""Bugs of linearizable reads (ReadIndex, dissertation §6.4)."""

from __future__ import annotations

from tests.mutants.planting import Mutant, mutant

LEAD = "ddb.leadership:Leadership."
REPLICA = "ddb.replica:Replica."

READS: list[Mutant] = [
    mutant(
        "follower serves linearizable reads itself",
        "a follower answers from its own state without asking the leader",
        REPLICA + "_ask_for_reads",
        "self._tickets += 1",
        "if not self.is_leader:\n        reads, self._reads = self._reads, []\n        for read in reads:\n"
        "            self._answer_read(*read, b'')\n        return\n    self._tickets += 1",
        claim="test_replica.py::test_a_write_at_any_member_is_done_once_and_seen_at_every_member",
    ),
    mutant(
        "leader serves reads from its own state",
        "who thinks that it leads answers from what it has applied, and asks nobody",
        REPLICA + "_ask_for_reads",
        "self._tickets += 1",
        "if self.is_leader:\n        reads, self._reads = self._reads, []\n        for read in reads:\n"
        "            self._answer_read(*read, b'')\n        return\n    self._tickets += 1",
        claim="test_replica.py::test_a_stale_leader_answers_neither_a_write_nor_a_read",
    ),
    mutant(
        "reads before the leader has committed in its own term",
        "a new leader takes its commit index for the cluster's",
        LEAD + "_start_read_round",
        " or not self.has_committed:",
        ":",
        claim="test_raft_dissertation.py::test_a_new_leader_answers_no_read_before_its_first_commit",
    ),
    mutant(
        "reads without confirming leadership",
        "a leader that was replaced still answers",
        LEAD + "_confirm_reads",
        "if not self._is_majority(lambda progress: progress.round >= self._read_round):\n        return",
        "pass",
        claim="test_raft_dissertation.py::test_a_leader_that_was_stopped_neither_commits_nor_reads_in_the_past",
    ),
    mutant(
        "an earlier echo confirms a later read",
        "an answer to the round before counts for this one",
        LEAD + "_confirm_reads",
        "progress.round >= self._read_round",
        "progress.round >= self._read_round - 1",
        claim="test_raft_dissertation.py::test_a_read_asked_later_waits_for_a_later_exchange",
    ),
    mutant(
        "any answer confirms a read",
        "an echo of whatever round shows that the leader is followed",
        LEAD + "_confirm_reads",
        "progress.round >= self._read_round",
        "progress.heard_at > 0",
        claim="test_raft_dissertation.py::test_a_read_asked_later_waits_for_a_later_exchange",
    ),
    mutant(
        "a read joins the round that is under way",
        "a read that came later is confirmed by what was asked before",
        LEAD + "read",
        "self._reads_waiting.append((src, ticket))",
        "(self._reads_active or self._reads_waiting).append((src, ticket))",
        claim="test_raft_dissertation.py::test_a_read_asked_later_waits_for_a_later_exchange",
    ),
    mutant(
        "a read does not wait until its index is applied",
        "a member that lags answers a confirmed read from its old state",
        REPLICA + "_answer_reads",
        "if index > self.machine.applied:",
        "if False:",
    ),
    mutant(
        "a learner confirms a read",
        "those who have no vote count when the leader asks who follows it",
        LEAD + "_is_majority",
        "voters = self._member.config.voters",
        "voters = tuple(m.id for m in self._member.config.members)",
        claim="test_raft_dissertation.py::test_a_learner_confirms_no_leadership",
    ),
    mutant(
        "a half confirms a read",
        "half of an even cluster is taken for a majority, as by a leader that the other half has replaced",
        LEAD + "_is_majority",
        "return 2 * agreed > len(voters)",
        "return 2 * agreed >= len(voters)",
        claim="scripts/membership_rolled_back.txt",
    ),
    mutant(
        "a stale state is not said to be wrong",
        "a member whose digest differs goes on serving",
        REPLICA + "_compare_digest",
        "if own is None or own == digest or self.is_leader or self.diverged:",
        "if True:",
        claim="test_replica.py::test_a_member_whose_digest_differs_stops_answering_and_asks_for_a_snapshot",
    ),
]
