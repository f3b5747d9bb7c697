"""Every benchmark, one after the other, with one command; and the document made of them.

    python -m bench.all --dir /srv/bench --full         # half an hour; then docs/performance.md is new
    python -m bench.all --dir /srv/bench --quick        # some seven; then see /srv/bench/quick/performance.md

Laws: a part is a program of its own, with the options that stand in `PARTS`: the same as by hand. What a part has
measured stays in a file of its own; a part whose file is there is not done again, so a run that was interrupted goes on where it
was, and who wants a part anew removes its file. What a part that failed did measure is shown, and the exit code tells.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from bench import report
from bench.servers import commanded
from bench.systems import REPOSITORY

MODES = ("quick", "full")
INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Part:
    """One program: its options and about how many seconds it takes, in each mode."""

    name: str
    module: str
    quick: str
    quick_s: int
    full: str
    full_s: int

    def options(self, mode: str) -> list[str]:
        """The options in `mode`."""
        return (self.quick if mode == "quick" else self.full).split()

    def seconds(self, mode: str) -> int:
        """About how long it takes in `mode`."""
        return self.quick_s if mode == "quick" else self.full_s


PARTS = (
    Part("limits", "peers", "--only limits --seconds 1", 10, "--only limits", 25),
    Part(
        "work", "peers", "--only put,get,stale --rounds 3 --seconds 0.8 --warm-up 0.2 --rehearsal 4", 150,
        "--only put,get,stale --rounds 5 --seconds 3", 670,
    ),
    Part("failover", "peers", "--only failover --failovers 5", 45, "--only failover --failovers 10", 120),
    Part("million", "peers", "--only million", 130, "--only million", 130),
    Part(
        "growth", "growth",
        "--only keys,clients,batches --keys 10000,100000 --clients 1,64,1024 --batches 1,100 --seconds 1", 30, "", 480,
    ),
    Part("upkeep", "upkeep", "--only checkpoints,join --keys 10000 --seconds 8 --before 3", 55, "", 200),
    Part("cost", "cost", "--works put:64:1,get:64:1 --seconds 1.5 --json", 15, "--json", 70),
)  # fmt: skip


def command(part: Part, mode: str, data: Path, out: Path, etcd: str | None) -> list[str]:
    """How to run `part`, with its data under `data` and its figures going to `out`, if it doesn't print them."""
    words = [sys.executable, "-m", f"bench.{part.module}", *part.options(mode), "--dir", str(data)]
    if part.module != "cost":
        words += ["--out", str(out)]
    if etcd is not None and part.module == "peers":
        words += ["--etcd", etcd]
    return words


def do(part: Part, mode: str, where: Path, etcd: str | None) -> int:
    """Run one part; returns its exit code. Its file gets its name once it is complete."""
    draft, final = unfinished(where, part), finished(where, part)
    words = command(part, mode, where / "data", draft.resolve(), etcd)
    printed = draft if part.module == "cost" else where / f"{part.name}.txt"
    with printed.open("wb") as output:
        code = carry_out(words, output)
    if code == 0:
        draft.replace(final)
    return code


def carry_out(words: Sequence[str], output: BinaryIO) -> int:
    """Run a command to its end; returns its exit code.

    An interrupt is passed on once, and then it is waited for: the command has servers of its own to end. It runs in a
    session of its own, or a terminal would interrupt it a second time while it does.
    """
    process = subprocess.Popen(words, stdout=output, stdin=subprocess.DEVNULL, cwd=REPOSITORY, start_new_session=True)
    told = False
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            if not told:
                told = True
                process.send_signal(signal.SIGINT)


def finished(where: Path, part: Part) -> Path:
    """Where the figures of a part are that was measured to its end."""
    return where / f"{part.name}.json"


def unfinished(where: Path, part: Part) -> Path:
    """Where those of a part are that is under way, or failed."""
    return where / f"{part.name}.unfinished.json"


def measure(parts: Sequence[Part], mode: str, where: Path, etcd: str | None, say: Callable[[str], None]) -> int:
    """Run all parts that are not done; returns 0, 1 where one failed, or 130 where it was interrupted."""
    missing = [part for part in parts if not finished(where, part).exists()]
    for part in parts:
        if part not in missing:
            say(f"{part.name}: done before")
    worst = 0
    for i, part in enumerate(missing):
        left_s = sum(p.seconds(mode) for p in missing[i:])
        say(
            f"{part.name} ({i + 1} of {len(missing)}): {duration(part.seconds(mode))}; all that is left: {duration(left_s)}"
        )
        began = time.monotonic()
        code = do(part, mode, where, etcd)
        say(
            f"{part.name}: {'done' if code == 0 else f'failed with code {code}'} after {time.monotonic() - began:.0f} s"
        )
        if code == INTERRUPTED or code < 0:
            return INTERRUPTED
        worst = max(worst, min(code, 1))
    return worst


def duration(seconds: float) -> str:
    """About how long, in words."""
    return f"about {seconds:.0f} s" if seconds < 100 else f"about {seconds / 60:.0f} min"


def document_of(where: Path) -> Path:
    """A document with nothing but the marks, for figures that are not to be published."""
    document = where / "performance.md"
    document.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    return document


def files(parts: Sequence[Part], where: Path) -> list[str]:
    """The figures that there are: of a part that is not finished, what it did measure."""
    found = [next((f for f in (finished(where, p), unfinished(where, p)) if _has_content(f)), None) for p in parts]
    return [str(path) for path in found if path is not None]


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.all", description=(__doc__ or "").split("\n")[0])
    mode = p.add_mutually_exclusive_group()
    for name in MODES:
        seconds = sum(part.seconds(name) for part in PARTS)
        mode.add_argument(
            f"--{name}", dest="mode", action="store_const", const=name, default="full",
            help=duration(seconds) + (" (the default)" if name == "full" else ", rougher figures"),
        )  # fmt: skip
    p.add_argument("--dir", type=Path, required=True, help="for results, and for data: on the disk to be measured")
    p.add_argument("--only", default=",".join(part.name for part in PARTS), help="of %(default)s")
    p.add_argument("--etcd", metavar="PATH", help="etcd's program, where it is not on the PATH")
    p.add_argument(
        "--document",
        type=Path,
        help="where the figures go (default: docs/performance.md, or with --quick one under --dir)",
    )
    return p


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    wanted = a.only.split(",")
    if not set(wanted) <= {part.name for part in PARTS}:
        p.error(f"--only takes {', '.join(part.name for part in PARTS)}")
    parts = [part for part in PARTS if part.name in wanted]
    where = a.dir.resolve() / a.mode
    etcd = str(Path(a.etcd).resolve()) if a.etcd else None
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        (where / "data").mkdir(parents=True, exist_ok=True)
        code = measure(parts, a.mode, where, etcd, lambda text: print(f"== {text}", file=sys.stderr, flush=True))
        with contextlib.suppress(OSError):
            (where / "data").rmdir()
        if code == INTERRUPTED:
            return code
        document = a.document or (document_of(where) if a.mode == "quick" else report.DOCUMENT)
        return report.main([*files(PARTS, where), "--document", str(document)]) or code
    except OSError as error:
        print(f"bench.all: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(commanded(main))
