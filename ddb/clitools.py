"""The commands that need no client, or bring their own: up, verify, sim, bench."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from pathlib import Path
from typing import Final

from ddb import options, overview
from ddb.client import connect
from ddb.console import ERROR, OK, Command, UsageError, as_json, complain, say, say_json
from ddb.errors import DdbError
from ddb.formats import Format
from ddb.progress import Progress


def _up(args: argparse.Namespace) -> int:
    from ddb import up  # it needs the machinery of processes, which others don't

    settings = up.Settings(
        Path(args.dir), args.nodes, args.host, args.port, args.registry_port, args.election, args.ready_timeout
    )

    def say_now(line: str) -> None:
        say(line)
        sys.stdout.flush()

    return up.run(settings, say_now, overview.wants_colour(sys.stdout))


def _verify(args: argparse.Namespace) -> int:
    from ddb import verify  # like `up`, it needs more than others

    if args.html is not None and not _can_be_written(args.html):
        raise UsageError(f"{args.html} can't be written: choose another file for --html.")
    settings = verify.Settings(
        servers=tuple(addresses(args.server)), seconds=args.seconds, clients=args.clients, keys=args.keys,
        rate=args.rate, mix=args.mix, timeout_s=args.timeout, seed=args.seed, faults=args.faults or (),
        nodes=args.nodes, election=args.election,
    )  # fmt: skip
    with Progress(sys.stderr) as progress:
        findings = verify.run(settings, progress.show)
    if as_json(args):
        say_json(findings.to_json())
    else:
        say("\n".join(findings.lines(overview.wants_colour(sys.stdout))))
    if findings.refuted and args.html is not None:
        args.html.write_text(findings.to_html(), encoding="utf-8")
        complain(f"The picture is in {args.html}.")
    if findings.trouble:
        complain(findings.trouble)
    return findings.exit_code


def _bench(args: argparse.Namespace) -> int:
    from ddb import benchmark

    settings = benchmark.Settings(
        tuple(addresses(args.server)), args.seconds, args.clients, args.value_size, args.keys, args.timeout
    )
    with Progress(sys.stderr) as progress:
        report = benchmark.run(settings, progress.show)
    if as_json(args):
        say_json(report.to_json())
    else:
        say("\n".join(report.lines(overview.wants_colour(sys.stdout))))
    if report.trouble:
        complain(report.trouble)
    return report.exit_code


def _can_be_written(path: Path) -> bool:
    place = path if path.exists() else path.parent
    return os.access(place, os.W_OK) and not path.is_dir()


def addresses(servers: str) -> list[str]:
    """The addresses in `--server`, each in the one way. Raises UsageError."""
    try:
        with connect(servers, discover=False) as client:
            return list(client.servers)
    except DdbError as error:
        raise UsageError(error.message) from None


def _sim(args: argparse.Namespace) -> int:
    from ddb import simreport  # it needs everything

    try:
        faults, kept = simreport.fault_kinds(args.faults), simreport.positions(args.keep)
    except ValueError as error:
        raise UsageError(str(error)) from None
    seed = secrets.randbelow(1 << 32) if args.seed is None else args.seed
    asked = simreport.Options(seed, args.nodes, args.election, args.steps, faults, args.until, kept)

    def quiet(line: str) -> None:
        """Programs want the JSON alone."""

    heard = quiet if as_json(args) else say
    with Progress(sys.stderr) as progress:
        if args.seeds > 1:
            tally = simreport.many(asked, args.seeds, args.jobs, heard, progress.show)
        else:
            tally = simreport.one(asked, heard, args.trace, args.minimize, progress.show)
    if as_json(args):
        say_json(tally.to_json())
    return ERROR if tally.failures else OK


_PROSE: Final = (Format.TABLE, Format.JSON)

COMMANDS: Final = (
    Command(
        "up",
        options.up_options,
        "run a whole cluster on this machine until Ctrl-C",
        ("ddb up --nodes 5 --dir /tmp/five",),
        alone=_up,
        formats=(),
        common=False,
    ),
    Command(
        "verify",
        options.verify_options,
        "see whether what clients are told is linearizable (exit code 0) or not (1)",
        ("ddb verify --faults",),
        alone=_verify,
        formats=_PROSE,
    ),
    Command(
        "sim",
        options.sim_options,
        "simulate a cluster, its clients and all that can go wrong, from one seed (exit code 1: a rule was broken)",
        ("ddb sim --seed 7 --nodes 3 --trace",),
        alone=_sim,
        formats=(Format.JSON,),
        common=False,
    ),
    Command(
        "bench",
        options.bench_options,
        "measure how fast the cluster answers, with keys of its own that it removes again",
        ("ddb bench --clients 16 --seconds 5",),
        alone=_bench,
        formats=_PROSE,
    ),
)
