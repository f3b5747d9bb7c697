"""From a line typed into the shell to words, and back.

Laws:

1. Words are those of a POSIX shell: blanks part them, '…' is as it stands, "…" too but for a backslash, and a backslash
   takes the next character as it stands. Nothing is expanded, replaced, or run.
2. A word that begins with { or [ is JSON: it ends where its last brace is closed, and quotes inside it are JSON's own.
   So JSON is typed as it is, over as many lines as it likes.
3. A backslash at the very beginning begins a command of the shell's own, and stands for itself.
4. What isn't finished is told apart from what is wrong: there is nothing wrong with half a line.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Final

BLANKS: Final = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Word:
    """A word's `text`, where it begins in the line (`start`), and whether it is `closed`: no quote or brace is open."""

    text: str
    start: int
    closed: bool = True


def words(line: str) -> list[Word]:
    """The words of `line`. Only the last one can be one that isn't closed."""
    found: list[Word] = []
    at = 0
    while True:
        while at < len(line) and line[at] in BLANKS:
            at += 1
        if at == len(line):
            return found
        if line[at] in "{[":
            word, at = _json(line, at)
        else:
            word, at = _plain(line, at, bare=not found)
        found.append(word)


def complete(line: str) -> bool:
    """Whether `line` may be run: nothing in it waits for its end."""
    return all(word.closed for word in words(line))


def quoted(text: str, mark: str = "'") -> str:
    """`text` as one word, in quotation marks where it needs them: `mark`, ' or "."""
    if text and not set(text) & set("'\"\\{[" + BLANKS):
        return text
    if mark == '"':
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return shlex.quote(text)


def in_one_line(line: str) -> str | None:
    """The same words as those of `line` without a line break, for a history that is kept by lines; None where a break is
    part of a quoted text."""
    joined = " ".join(part.strip() for part in line.split("\n"))
    return joined if [_compact(word) for word in words(joined)] == [_compact(word) for word in words(line)] else None


def _compact(word: Word) -> str:
    """A word's text; that of JSON without blanks, which mean nothing there but within strings, and these hold no breaks."""
    return "".join(word.text.split()) if word.text[:1] in ("{", "[") else word.text


def _json(line: str, start: int) -> tuple[Word, int]:
    """The word of law 2 that begins at `start`, and where it ends."""
    depth, at, in_string = 0, start, False
    while at < len(line):
        character = line[at]
        at += 1
        if in_string:
            if character == "\\":
                at += 1
            in_string = character != '"'
        elif character == '"':
            in_string = True
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
            if depth == 0:
                return Word(line[start:at], start), at
    return Word(line[start:], start, False), len(line)


def _plain(line: str, start: int, bare: bool) -> tuple[Word, int]:
    """The word of law 1 that begins at `start`, and where it ends; `bare`: of law 3, where it begins with a backslash."""
    bare = bare and line[start] == "\\"
    text, at, quote = line[start] if bare else "", start + bare, ""
    while at < len(line):
        character = line[at]
        if quote:
            if character == quote:
                quote = ""
            elif character == "\\" and quote == '"' and line[at + 1 : at + 2] in ('"', "\\"):
                at += 1
                text += line[at]
            else:
                text += character
        elif character in BLANKS:
            break
        elif character in "'\"":
            quote = character
        elif character == "\\":
            at += 1
            if at >= len(line):
                return Word(text, start, False), at
            text += line[at].replace("\n", "")
        else:
            text += character
        at += 1
    return Word(text, start, not quote), at
