"""A registry and some nodes in a temporary directory, the load on their leader, one table.

    python -m bench.cluster --nodes 3 --clients 1,16,64,256 --ops put,get,stale

Law: what is measured is what ships: `python -m ddb.registry` and `python -m ddb.node` as they are, each a process with
its own directory and every setting at its default. All are ended by pid, whatever happens.

Theory. One row is one kind of request at one number of clients. Beside the throughput and the latencies stands what
each process took of a core in those seconds (from /proc, where there is one): on a small machine the cores are what
runs out, and the figure tells whose work to make cheaper. The file system under the directory decides what an fsync
costs: `--dir` says where it is, and a tmpfs measures no disk at all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.load import Plan, fill, frame, run

REPOSITORY = Path(__file__).resolve().parent.parent
LISTENING = re.compile(rb"listening on (\S+:\d+)")
READY_TIMEOUT_S = 30.0
STOP_PATIENCE_S = 10.0
OPS = {
    "put": ("put", "linearizable"),
    "get": ("get", "linearizable"),
    "stale": ("get", "stale"),
    "mixed": ("mixed", "linearizable"),
}
COLUMNS = ("op", "clients", "ops/s", "p50 ms", "p95 ms", "p99 ms", "max ms", "errors", "leader", "others", "load")


@dataclass(slots=True)
class Server:
    """A process that was started here."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    address: str = ""

    def cpu_s(self) -> float:
        """The processor time it has used, in seconds; 0 where the system doesn't tell."""
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start(name: str, module: str, directory: Path, *flags: str) -> Server:
    """Start `python -m module` on a free port and wait until it says where it listens. Raises RuntimeError."""
    log = directory / f"{name}.out"
    command = [sys.executable, "-m", module, "--port", "0", "--data-dir", str(directory / name), *flags]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("DDB_")}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**clean, "PYTHONPATH": str(REPOSITORY)},
        )
    server = Server(name, process, log)
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not (found := LISTENING.search(log.read_bytes())):
        if process.poll() is not None or time.monotonic() > deadline:
            stop([server])
            raise RuntimeError(f"{name} did not start:\n{log.read_text(errors='replace')}")
        time.sleep(0.01)
    server.address = found[1].decode()
    return server


def stop(servers: list[Server]) -> None:
    """Ask all to end, and kill those that don't."""
    for server in servers:
        server.process.terminate()
    deadline = time.monotonic() + STOP_PATIENCE_S
    for server in servers:
        try:
            server.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


def ask(address: str, **request: Any) -> dict[str, Any]:
    """One request and its reply. Raises OSError or ValueError."""
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 5.0) as connection, connection.makefile("rb") as stream:
        connection.sendall(frame(json.dumps(request).encode()))
        reply: dict[str, Any] = json.loads(stream.read(int(stream.readline()) + 1))
        return reply


def leader_of(nodes: list[Server]) -> Server | None:
    """The node that leads, once every node knows it and all are voters of one cluster."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        replies = [ask(node.address, op="status") for node in nodes]
        leaders = {reply["leader"]["address"] for reply in replies}
        voters = [sum(member["role"] == "voter" for member in reply["members"]) for reply in replies]
        if len(leaders) == 1 and voters == [len(nodes)] * len(nodes):
            return next((node for node in nodes if node.address in leaders), None)
    return None


@contextlib.contextmanager
def running(count: int, directory: Path, flags: list[str]) -> Iterator[tuple[Server, list[Server]]]:
    """A cluster of `count` nodes: its leader, and all nodes. Without a registry where there is one node."""
    servers: list[Server] = []
    try:
        where: list[str] = []
        if count > 1:
            servers.append(start("registry", "ddb.registry", directory))
            where = ["--registry", servers[0].address]
        nodes = []
        for i in range(count):
            nodes.append(start(f"n{i + 1}", "ddb.node", directory, "--name", f"n{i + 1}", *where, *flags))
            servers.append(nodes[-1])
        deadline = time.monotonic() + READY_TIMEOUT_S
        while (leader := leader_of(nodes)) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no cluster of {count} within {READY_TIMEOUT_S:.0f} s: see {directory}/*.out")
            time.sleep(0.05)
        yield leader, nodes
    finally:
        stop(servers)


def measure(plan: Plan, leader: Server, nodes: list[Server]) -> dict[str, Any]:
    """The figures of one row: those of `bench.load`, and the shares of a core that the nodes took."""
    before = {node.name: node.cpu_s() for node in nodes}
    figures = run(plan).summary()
    span = plan.seconds + plan.warm_up_s
    shares = {node.name: round(100 * (node.cpu_s() - before[node.name]) / span) for node in nodes}
    return {
        **figures,
        "op": plan.op if plan.read == "linearizable" else "stale",
        "clients": plan.clients,
        "pipeline": plan.pipeline,
        "leader_cpu_percent": shares.pop(leader.name),
        "other_cpu_percent": list(shares.values()),
    }


def row(figures: dict[str, Any]) -> tuple[str, ...]:
    """The figures as the cells of `COLUMNS`."""

    def ms(name: str) -> str:
        return "-" if figures[name] is None else f"{figures[name]:.2f}"

    clients = str(figures["clients"]) if figures["pipeline"] == 1 else f"{figures['clients']} × {figures['pipeline']}"
    return (
        figures["op"], clients, f"{figures['ops_per_s']:,.0f}", ms("p50_ms"), ms("p95_ms"), ms("p99_ms"), ms("max_ms"),
        str(sum(figures["errors"].values())), f"{figures['leader_cpu_percent']} %",
        " ".join(map(str, figures["other_cpu_percent"])) + " %" if figures["other_cpu_percent"] else "-",
        f"{figures['load_cpu_percent']:.0f} %",
    )  # fmt: skip


def table(rows: list[tuple[str, ...]]) -> str:
    """Aligned columns that are a Markdown table too."""
    lines = [COLUMNS, *rows]
    widths = [max(len(cells[i]) for cells in lines) for i in range(len(COLUMNS))]
    text = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(cells, widths)) + " |" for cells in lines]
    text.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(text)


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    p = argparse.ArgumentParser(prog="python -m bench.cluster", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--nodes", type=int, default=3)
    p.add_argument("--ops", default="put,get,stale", help=f"of {', '.join(OPS)} (default %(default)s)")
    p.add_argument("--clients", default="1,16,64,256", help="a row for each number (default %(default)s)")
    p.add_argument("--pipeline", type=int, default=1)
    p.add_argument("--value-size", type=int, default=256, metavar="BYTES")
    p.add_argument("--keys", type=int, default=10_000)
    p.add_argument("--seconds", type=float, default=5.0, help="a row (default %(default)s)")
    p.add_argument("--warm-up", type=float, default=1.0, metavar="SECONDS")
    p.add_argument("--processes", type=int, default=1, help="of the load generator")
    p.add_argument("--to", choices=("leader", "follower", "all"), default="leader", help="where the clients connect")
    p.add_argument("--dir", type=Path, help="where the nodes keep their data (default: a temporary directory)")
    p.add_argument("--node-flag", action="append", default=[], metavar="FLAG", help="given to each node; repeatable")
    p.add_argument("--json", action="store_true", help="print one JSON object a row instead of the table")
    return p


def targets(to: str, leader: Server, nodes: list[Server]) -> tuple[str, ...]:
    """The addresses that the clients connect to."""
    others = tuple(node.address for node in nodes if node is not leader)
    return {"leader": (leader.address,), "follower": others[:1] or (leader.address,), "all": (leader.address, *others)}[
        to
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    p = parser()
    a = p.parse_args(arguments)
    ops, clients = a.ops.split(","), [int(n) for n in a.clients.split(",") if n.isdecimal()]
    if a.nodes < 1 or not clients or 0 in clients or not set(ops) <= set(OPS):
        p.error(f"--nodes is at least 1, --clients numbers like 1,64, --ops of {', '.join(OPS)}")
    if a.dir:
        a.dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="ddb-bench-", dir=a.dir))
    base = Plan((), 1, "put", a.value_size, a.seconds, a.warm_up, a.pipeline, a.keys, processes=a.processes, fill=False)
    rows = []
    try:
        with running(a.nodes, directory, a.node_flag) as (leader, nodes):
            if set(ops) != {"put"}:
                fill(replace(base, servers=(leader.address,)))
            for op, count in [(op, count) for op in ops for count in clients]:
                kind, read = OPS[op]
                plan = replace(base, servers=targets(a.to, leader, nodes), clients=count, op=kind, read=read)
                figures = measure(plan, leader, nodes)
                rows.append(row(figures))
                print(json.dumps(figures) if a.json else f"{op}, {count} clients: {figures['ops_per_s']:,.0f}/s",
                      file=sys.stdout if a.json else sys.stderr, flush=True)  # fmt: skip
        if not a.json:
            print(table(rows))
    except (OSError, RuntimeError) as error:
        print(f"bench.cluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
