"""What may stand behind each command on the command line.

Each function adds the options of one command to its parser. What they mean to the command is in cli.py; here is how they
are called, what they take, and what they are when they are not given.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from ddb.formats import Format
from ddb.settings import seconds, utf8, whole
from ddb.workload import MIX, Fault, mix_shown, parse_faults, parse_mix

DEFAULT_SERVER: Final = "127.0.0.1:8050"
REVISION_MAX: Final = (1 << 63) - 1
UP_DIRECTORY: Final = "ddb-data"
TIMEOUT_S: Final = 5.0
VERIFY_TIMEOUT_S: Final = 1.0  # of one operation
_KEYS: Final = "a key; - reads keys from standard input, @FILE from a file, one a line (@@… is @…)"


def _any_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None


def common(
    parser: argparse.ArgumentParser,
    top: bool,
    formats: Sequence[Format] = tuple(Format),
    timeout_s: float = TIMEOUT_S,
) -> None:
    """The options that stand before or after the command; after it they only count when they are given."""

    def default(value: Any) -> Any:
        return value if top else argparse.SUPPRESS

    server = os.environ.get("DDB_SERVER") or DEFAULT_SERVER
    parser.add_argument(
        "--server",
        metavar="HOST:PORT[,…]",
        default=default(server),
        help=f"the nodes to ask, the first that answers (DDB_SERVER, else {DEFAULT_SERVER})",
    )
    output_options(parser, formats, default(None))
    parser.add_argument(
        "--timeout",
        metavar="S",
        type=seconds(0.001, 1e6),
        default=default(None),
        help=f"seconds to try ({timeout_s:g})",
    )


def output_options(parser: argparse.ArgumentParser, formats: Sequence[Format], default: Any) -> None:
    """`-o` with these `formats`, and `--json`, where the command has any."""
    if len(formats) > 1:
        offered = "|".join(form.value for form in formats)
        parser.add_argument(
            "-o", "--output", metavar=offered, type=_format(formats), default=default, help="how to show the result"
        )
    if Format.JSON in formats:
        parser.add_argument(
            "--json", dest="output", action="store_const", const=Format.JSON, default=default,
            help="print the whole reply as JSON, like -o json",
        )  # fmt: skip


def _format(formats: Sequence[Format]) -> Callable[[str], Format]:
    def parse(text: str) -> Format:
        for form in formats:
            if form.value == text:
                return form
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(form.value for form in formats)}")

    return parse


def _condition_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("only if (all that are given must hold)")
    group.add_argument(
        "--if-rev", metavar="N", type=whole(0, REVISION_MAX), help="its revision is N (0: there is none)"
    )
    group.add_argument(
        "--if-version", metavar="N", type=whole(0, REVISION_MAX), help="it was changed N times since it was created"
    )
    group.add_argument("--if-value", metavar="V", help="its value is V (of the same --type)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--if-absent", action="store_true", help="there is no such key")
    either.add_argument("--if-exists", action="store_true", help="there is such a key")


def _type_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-t", "--type", choices=("text", "json", "bytes", "base64"), default="text", help="how to take the value (text)"
    )
    parser.add_argument("--bytes", action="store_true", help="the same as --type bytes")


def value_type(args: argparse.Namespace) -> str:
    """How the values among `args` are to be taken."""
    return "bytes" if args.bytes else str(args.type)


def _read_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stale", action="store_true", help="the asked node's own state, without a round trip")
    parser.add_argument("--max-lag", metavar="S", type=seconds(0.001, 1e6), help="with --stale: fail where it is older")


def _range_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", nargs="?", type=utf8, metavar="PREFIX", help="keys that begin so (all when left out)")
    parser.add_argument("--start", type=utf8, metavar="KEY", help="keys from this one on")
    parser.add_argument("--end", type=utf8, metavar="KEY", help="keys below this one")


def put_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb put`."""
    parser.add_argument("key", metavar="KEY", help="the key; - and @FILE as for the value")
    parser.add_argument(
        "value", metavar="VALUE", help="the value; - reads it from standard input, @FILE from a file (@@… is @…)"
    )
    _type_option(parser)
    parser.add_argument("--lease", metavar="ID", type=whole(1, REVISION_MAX), help="delete it when this lease ends")
    _condition_options(parser)


def get_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb get`."""
    parser.add_argument("keys", metavar="KEY", nargs="+", help=_KEYS)
    parser.add_argument("--rev", metavar="R", type=whole(1, REVISION_MAX), help="as it was at revision R")
    _read_options(parser)


def del_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb del`."""
    parser.add_argument("keys", metavar="KEY", nargs="+", help=_KEYS)
    _type_option(parser)
    _condition_options(parser)


def scan_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb scan`."""
    _range_options(parser)
    parser.add_argument(
        "--limit", metavar="N", type=whole(1, REVISION_MAX), help="at most N items (all when not given)"
    )
    parser.add_argument("--reverse", action="store_true", help="the last key first")
    parser.add_argument("--keys-only", action="store_true", help="without the values")
    _read_options(parser)


def count_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb count`."""
    _range_options(parser)
    _read_options(parser)


def incr_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb incr`."""
    parser.add_argument("key", type=utf8, metavar="KEY")
    parser.add_argument("by", metavar="BY", nargs="?", type=_any_integer, default=1, help="how much to add (1)")


def txn_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb txn`."""
    parser.add_argument(
        "txn", metavar="TXN", nargs="?", default="-", help="a JSON object, a file that holds one, or - (standard input)"
    )


def name_option(parser: argparse.ArgumentParser) -> None:
    """Of `ddb remove` and `ddb promote`."""
    parser.add_argument("name", metavar="NAME", help="the member's name or id")


def transfer_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb transfer`."""
    parser.add_argument("to", metavar="NAME", nargs="?", help="the voter to lead (the most up-to-date when left out)")


def bench_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb bench`."""
    parser.add_argument("--seconds", metavar="S", type=seconds(0.5, 60.0), default=10.0, help="of load in all (10)")
    parser.add_argument("--clients", metavar="N", type=whole(1, 256), default=64, help="that ask at the same time (64)")
    parser.add_argument(
        "--value-size", metavar="BYTES", type=whole(0, 1 << 20), default=256, help="of each value (256)"
    )
    parser.add_argument("--keys", metavar="N", type=whole(1, 100_000), default=1000, help="in use (1000)")


def log_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb log`."""
    parser.add_argument(
        "--from", metavar="N", dest="from_", type=whole(1, REVISION_MAX), help="the first index to show"
    )
    parser.add_argument(
        "--limit", metavar="N", type=whole(1, REVISION_MAX), default=100, help="at most N entries (100)"
    )


def up_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb up`."""
    parser.add_argument("--nodes", metavar="N", type=whole(1, 99), help="how many nodes (as many as DIR holds, else 3)")
    parser.add_argument("--dir", metavar="DIR", default=UP_DIRECTORY, help=f"data and logs ({UP_DIRECTORY})")
    parser.add_argument("--host", default="127.0.0.1", help="the address that all listen on (127.0.0.1)")
    parser.add_argument(
        "--port", metavar="P", type=whole(0, 65535), default=8050, help="of n1; n2 gets P+1, … (8050; 0: any)"
    )
    parser.add_argument("--registry-port", metavar="P", type=whole(0, 65535), help="of the registry (one below --port)")
    parser.add_argument("--election", choices=("bully", "raft"), help="how a new cluster elects (bully)")
    parser.add_argument(
        "--ready-timeout", metavar="S", type=seconds(0.001, 1e6), default=30.0, help="seconds to wait for a leader (30)"
    )


def verify_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb verify`."""
    parser.add_argument("--seconds", metavar="S", type=seconds(0.1, 1e6), default=10.0, help="of load (10)")
    parser.add_argument("--clients", metavar="N", type=whole(1, 256), default=8, help="that ask at the same time (8)")
    parser.add_argument(
        "--keys", metavar="N", type=whole(1, 3000), help="in use at a time (6, or more for many clients)"
    )
    parser.add_argument(
        "--rate", metavar="N", type=whole(1, 1_000_000), default=1000, help="operations a second, at most (1000)"
    )
    parser.add_argument(
        "--mix", metavar="OP=N,…", type=parse_mix, default=MIX, help=f"how often what is asked ({mix_shown(MIX)})"
    )
    parser.add_argument("--seed", metavar="N", type=whole(0, REVISION_MAX), help="draw the same lots again")
    parser.add_argument("--html", metavar="FILE", type=Path, help="draw a counter-example there, if there is one")
    group = parser.add_argument_group("with faults (on a cluster of its own, in a temporary directory)")
    group.add_argument(
        "--faults", metavar="LIST", nargs="?", type=parse_faults, const=tuple(Fault),
        help="harm one node after another: kill, stop, restart (all when only --faults)",
    )  # fmt: skip
    group.add_argument("--nodes", metavar="N", type=whole(3, 9), default=3, help="how many nodes it has (3)")
    group.add_argument("--election", choices=("bully", "raft"), help="how it elects (bully)")


def sim_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb sim`."""
    parser.add_argument("--seed", metavar="N", type=whole(0, REVISION_MAX), help="of all chance (drawn when not given)")
    parser.add_argument("--seeds", metavar="N", type=whole(1, 1 << 40), default=1, help="so many, from --seed on (1)")
    parser.add_argument("--jobs", metavar="N", type=whole(1, 256), default=1, help="processes for many seeds (1)")
    parser.add_argument("--nodes", metavar="N", type=whole(3, 7), help="3 to 7 (the seed draws them)")
    parser.add_argument("--election", choices=("bully", "raft"), help="how they elect (the seed draws it)")
    parser.add_argument(
        "--steps", metavar="N", type=whole(1, 1 << 40), help="heal after so many (30 simulated seconds)"
    )
    parser.add_argument("--faults", metavar="LIST", help="the kinds that may strike, or none (the seed draws them)")
    parser.add_argument("--keep", metavar="LIST", help="only these of the schedule's faults, by their numbers from 0")
    parser.add_argument("--trace", action="store_true", help="show all that happens")
    parser.add_argument("--until", metavar="STEP", type=whole(1, 1 << 40), help="end there, and show every node")
    parser.add_argument("--minimize", action="store_true", help="leave out faults as long as the same rule is broken")
    output_options(parser, (Format.JSON,), argparse.SUPPRESS)


def export_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb export`."""
    parser.add_argument("file", metavar="FILE", help="where to; - is standard output")
    parser.add_argument("--prefix", type=utf8, metavar="PREFIX", help="only keys that begin so")
    parser.add_argument("--start", type=utf8, metavar="KEY", help="only keys from this one on")
    parser.add_argument("--end", type=utf8, metavar="KEY", help="only keys below this one")
    parser.add_argument("--force", action="store_true", help="replace FILE where it is there already")
    parser.add_argument("--restart", action="store_true", help="begin anew where an export of FILE was killed")
    _quiet_option(parser)


def import_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb import`."""
    parser.add_argument("file", metavar="FILE", help="where from; - is standard input")
    parser.add_argument("--into", type=utf8, metavar="TEXT", help="put TEXT in front of every key")
    parser.add_argument("--state", metavar="PATH", type=Path, help="how far it got is kept here (FILE.import)")
    parser.add_argument("--restart", action="store_true", help="begin anew where an import of FILE was stopped")
    _quiet_option(parser)


def watch_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb watch`."""
    parser.add_argument("prefix", nargs="?", type=utf8, metavar="PREFIX", help="keys that begin so (all when left out)")
    parser.add_argument("--key", type=utf8, metavar="KEY", help="this key alone")
    parser.add_argument(
        "--from", metavar="R", dest="from_", type=whole(0, REVISION_MAX), help="from revision R on (from now on)"
    )
    parser.add_argument("--limit", metavar="N", type=whole(1, REVISION_MAX), help="end after N changes (never)")
    parser.add_argument(
        "--exec", metavar="COMMAND",
        help="run COMMAND for each change, one at a time, by no shell: DDB_EVENT, DDB_KEY, DDB_VALUE, DDB_REV and "
        "DDB_VERSION tell what happened, standard input too, as JSON",
    )  # fmt: skip


def history_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb history`."""
    parser.add_argument("key", nargs="?", type=utf8, metavar="KEY", help="this key alone (all when left out)")
    parser.add_argument("--prefix", type=utf8, metavar="PREFIX", help="keys that begin so")
    parser.add_argument(
        "--from", metavar="R", dest="from_", type=whole(0, REVISION_MAX), help="from revision R on (all that is kept)"
    )
    parser.add_argument("--to", metavar="R", type=whole(0, REVISION_MAX), help="up to revision R (the last one)")
    parser.add_argument(
        "--limit", metavar="N", type=whole(1, REVISION_MAX), default=100, help="about N changes at most (100)"
    )
    parser.add_argument("--reverse", action="store_true", help="the last change first")


def diff_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb diff`."""
    parser.add_argument("first", metavar="R1", type=whole(0, REVISION_MAX), help="the older revision")
    parser.add_argument("second", metavar="R2", type=whole(0, REVISION_MAX), help="the newer one")
    parser.add_argument("prefix", nargs="?", type=utf8, metavar="PREFIX", help="keys that begin so (all when left out)")


def _holding_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ttl", metavar="S", type=seconds(0.1, 86400.0), default=10.0,
        help="where its holder dies, it is free within S seconds (10)",
    )  # fmt: skip
    parser.add_argument("--wait", metavar="S", type=seconds(0.0, 1e9), help="give up after S seconds (never)")
    parser.add_argument("--value", metavar="TEXT", help="what others see of the holder (who and where it is)")
    parser.add_argument(
        "words", metavar="COMMAND", nargs="*", help="behind --: what to run meanwhile (without: wait for Ctrl-C)"
    )


def lock_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb lock`."""
    parser.add_argument("name", metavar="LOCK", help="the lock's name")
    _holding_options(parser)


def elect_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb elect`."""
    parser.add_argument("name", metavar="ELECTION", help="the election's name")
    parser.add_argument("--observe", action="store_true", help="only tell who leads, now and whenever that changes")
    parser.add_argument("--limit", metavar="N", type=whole(1, REVISION_MAX), help="with --observe: end after N times")
    _holding_options(parser)


def lease_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb lease`."""
    parser.add_argument("action", choices=("grant", "keepalive", "revoke", "list"))
    parser.add_argument("what", metavar="TTL or ID", nargs="?", help="with grant: seconds to live; else the lease's ID")
    parser.add_argument(
        "--once", action="store_true", help="with keepalive: one sign of life, instead of one after another"
    )


def mirror_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb mirror`."""
    parser.add_argument("target", metavar="HOST:PORT[,…]", help="nodes of the other cluster")
    parser.add_argument("prefix", nargs="?", type=utf8, metavar="PREFIX", help="keys that begin so (all when left out)")
    parser.add_argument("--into", type=utf8, metavar="TEXT", default="", help="put TEXT in front of every key there")
    parser.add_argument("--once", action="store_true", help="end when the copy is up to date, instead of following")
    parser.add_argument("--restart", action="store_true", help="copy everything again")
    _quiet_option(parser)


def completion_options(parser: argparse.ArgumentParser) -> None:
    """Of `ddb completion`."""
    parser.add_argument("what", choices=("bash", "zsh", "keys"), help="a script, or the keys that PREFIX may become")
    parser.add_argument("prefix", metavar="PREFIX", nargs="?", help="with keys: how they begin")


def _quiet_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing where all went well")


def none(parser: argparse.ArgumentParser) -> None:
    """A command without arguments of its own."""
