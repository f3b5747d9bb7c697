"""Known bugs, to be planted one at a time: the suite must object to each. They prove the proof.

Each is seen in the wild or easy to make, and is a small patch in memory to one function, or to the few that it takes
(planting.py). docs/testing.md has the table of what notices each.
"""

from __future__ import annotations

from tests.mutants.cluster import CLUSTER
from tests.mutants.elections import ELECTIONS
from tests.mutants.members import DOUBT, MEMBERS
from tests.mutants.planting import Mutant
from tests.mutants.reads import READS
from tests.mutants.replication import REPLICATION
from tests.mutants.storage import STORAGE
from tests.mutants.tenancy import TENANCY
from tests.mutants.watching import WATCHING_BUGS

CATALOGUE: list[Mutant] = [
    *ELECTIONS,
    *REPLICATION,
    *READS,
    *MEMBERS,
    *DOUBT,
    *STORAGE,
    *CLUSTER,
    *TENANCY,
    *WATCHING_BUGS,
]
