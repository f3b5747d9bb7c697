"""Find out anew what notices each mutant, and write the table of docs/testing.md.

    python -m tests.mutants [--seeds N] [--only TEXT] [--again | --recorded] [--aims NAME,…] [--by N]

The aims of the simulator are tried with the seeds from 1 to N each, "all faults" first. Rows that are there already are kept, as far
as their seed still finds the bug; `--again` looks for all of them from the beginning, `--recorded` for no others.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from tests.mutants import CATALOGUE
from tests.mutants.cluster import CLUSTER
from tests.mutants.elections import ELECTIONS
from tests.mutants.forks import Forks
from tests.mutants.members import DOUBT, MEMBERS
from tests.mutants.planting import Mutant
from tests.mutants.reads import READS
from tests.mutants.replication import REPLICATION
from tests.mutants.simulated import Found, search, simulate
from tests.mutants.storage import STORAGE
from tests.mutants.table import recorded, write
from tests.mutants.tenancy import TENANCY
from tests.mutants.watching import WATCHING_BUGS

WHERE: list[tuple[list[Mutant], list[str]]] = [
    (ELECTIONS, ["partitions", "messages"]),
    (REPLICATION, ["messages", "partitions", "disks", "freezes"]),
    (READS, ["messages", "partitions", "members"]),
    (MEMBERS, ["members", "snapshots"]),
    (DOUBT, ["rot", "members"]),
    (STORAGE, ["disks", "rot", "snapshots"]),
    (CLUSTER, ["members", "registry", "rot"]),
    (TENANCY, ["clocks", "freezes", "snapshots"]),
    (WATCHING_BUGS, ["snapshots", "messages"]),
]
"""Where a bug is looked for, beside "all faults"."""


def main() -> None:
    """Run the survey."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--seeds", type=int, default=40)
    parser.add_argument("--only", default="")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--recorded", action="store_true")
    parser.add_argument("--aims", default="")
    parser.add_argument("--by", type=int, default=2)
    arguments = parser.parse_args()
    found = recorded()
    chosen = [bug for bug in CATALOGUE if arguments.only in bug.name and (bug.name in found or not arguments.recorded)]
    before = {} if arguments.again else dict(found)
    forks = Forks(arguments.by, patience_s=30.0 * arguments.seeds)
    for bug in chosen:
        forks.add(bug.name, partial(_look, before.get(bug.name), _aims(bug, arguments.aims), arguments.seeds), bug)
    for bug in chosen:
        result = forks.result(bug.name)
        found.pop(bug.name, None)
        if isinstance(result, Found):
            found[bug.name] = result
        sys.stdout.write(f"{forks.took_s[bug.name]:6.1f} s  {bug.name}: {result or 'not found'}\n")
        sys.stdout.flush()
        write(found)


def _aims(bug: Mutant, wanted: str) -> list[str]:
    """Where to look for `bug`."""
    if wanted:
        return wanted.split(",")
    return next(["all faults", *aims] for bugs, aims in WHERE if bug in bugs)


def _look(before: Found | None, aims: list[str], seeds: int) -> Found | None:
    if before is not None and (rule := simulate(before.aim, before.seed)):
        return Found(before.aim, before.seed, rule)
    for aim in aims:
        if found := search(aim, range(1, seeds + 1)):
            return found
    return None


if __name__ == "__main__":
    main()
