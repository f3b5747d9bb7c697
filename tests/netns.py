"""A network of a test's own, in the kernel, with a firewall in it: real TCP, really cut.

Laws:

1. What a test does here reaches nobody else: a network namespace holds a loopback of its own and nothing besides. It ends
   by itself when the last process in it does.
2. Only the calling thread moves into the namespace, and what it starts from there on, threads and processes alike. Leaving
   it moves the thread back.
3. The rules in force are always those of the last call: they are replaced in one transaction, never added to.

Theory. A firewall in the output path sees each packet of the loopback once, with both addresses. As each node is bound to
an address of its own, for listening and for dialling, a pair of addresses is a direction between two nodes. A direction can
be broken in several ways (`Break`), which look different from above:

* SILENCE drops every packet. As the acknowledgements of the other direction are lost too, TCP stops there sooner or
  later. That is a pulled cable.
* MUTE drops only what the node says on connections that it has dialled. A node says all it has to say on these (peers.py),
  so the other direction goes on undisturbed, with acknowledgements and all. That is one-way deafness without end.
* RESET answers every packet with a TCP reset. That is a firewall with manners, or a machine that was started again.
* LOSS drops one packet in four, so TCP gets everything across, but late and in fits and starts.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType

from tests.harness import NodeServer

CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS = 0x8914
IFF_UP = 0x1

_libc = ctypes.CDLL(None, use_errno=True)


class Break(Enum):
    """How a direction is broken."""

    SILENCE = "silence"
    MUTE = "mute"
    RESET = "reset"
    LOSS = "loss"


@dataclass(frozen=True, slots=True)
class Way:
    """A direction: what `src` says to `dst`."""

    src: NodeServer
    dst: NodeServer


class Unavailable(Exception):
    """This machine has no such network to give; the text says why."""


class Namespace:
    """A network namespace with a loopback, a context manager. Raises Unavailable on entering."""

    def __enter__(self) -> Firewall:
        self._outside = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _call("setns", self._outside, CLONE_NEWNET)  # where it is already: whoever may do that can come back later
            _call("unshare", CLONE_NEWNET)
        except OSError as error:
            os.close(self._outside)
            raise Unavailable(f"a network namespace can't be made here, which takes root's rights: {error}") from error
        try:
            _loopback_up()
            return Firewall()
        except BaseException:
            self._leave()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        _call("setns", self._outside, CLONE_NEWNET)
        os.close(self._outside)


class Firewall:
    """The rules of the namespace that the calling thread is in. Raises Unavailable where it can't have any."""

    def __init__(self) -> None:
        self._load([])

    def cut(self, ways: Iterable[Way], how: Break = Break.SILENCE) -> None:
        """When this returns, `ways` are broken, and all others are whole."""
        self._load([rule for way in ways for rule in _rules(way, how)])

    def heal(self) -> None:
        """Let everything pass again."""
        self._load([])

    def _load(self, rules: list[str]) -> None:
        chain = "type filter hook output priority 0; policy accept;"
        # Added first, so that it can be deleted whether or not it was there: the whole file is one transaction.
        text = "\n".join(["add table ip faults", "delete table ip faults", "add table ip faults"])
        text += f"\nadd chain ip faults output {{ {chain} }}\n"
        text += "".join(f"add rule ip faults output {rule}\n" for rule in rules)
        try:
            subprocess.run(["nft", "-f", "-"], input=text.encode(), check=True, capture_output=True, timeout=10)
        except FileNotFoundError:
            raise Unavailable("there is no nft here, the program that sets a firewall (package nftables)") from None
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").strip()
            raise Unavailable(f"nft can't set a firewall here: {said}") from error


def _rules(way: Way, how: Break) -> list[str]:
    pair = f"ip saddr {way.src.host} ip daddr {way.dst.host}"
    match how:
        case Break.SILENCE:
            return [f"{pair} drop"]
        case Break.MUTE:
            return [f"{pair} tcp dport {way.dst.port} drop"]
        case Break.RESET:
            return [f"{pair} ip protocol tcp reject with tcp reset"]
        case Break.LOSS:
            return [f"{pair} numgen random mod 4 0 drop"]


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))


def _call(name: str, *arguments: int) -> None:
    """A system call that Python 3.11 has no function for."""
    if getattr(_libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
