"""Completion for people's own shells, and of keys for all of them.

Laws:

1. The scripts are written from the parser (grammar.py), so they know what it knows.
2. Keys come from the database, level by level like paths: below `user/` stand `user/7/` and `user/8/`, however many keys each
   of them holds. What it doesn't answer within COMPLETION_S is not offered, and nothing is ever said.

Theory. A script has one `case` after another, and a case is the same text in bash and in zsh: which words before the cursor are
a command, options, their values; what may stand here. Only the few lines around them differ, by how each shell tells
the words and takes the candidates.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Final

from ddb.client import Client
from ddb.commands import prefix_end
from ddb.console import say
from ddb.errors import DdbError
from ddb.grammar import Grammar, Option, Positional, Usage, grammar

COMPLETION_S: Final = 0.5
CANDIDATES_MAX: Final = 60
SHELLS: Final = ("bash", "zsh")
KEYS: Final = ("KEY", "PREFIX")
FILES: Final = ("FILE", "PATH", "DIR")

_BASH: Final = """\
# ddb's completion for bash. In ~/.bashrc: eval "$(ddb completion bash)"
__ddb_words() { mapfile -t COMPREPLY < <(compgen -W "$1" -- "$cur"); }
__ddb_files() { compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen -f -- "$cur"); }
__ddb_keys() {
    local key begun
    begun=${cur%"${cur##*[:=]}"}  # what bash takes for words of their own, and leaves as it is
    compopt -o nospace 2>/dev/null
    while IFS= read -r key; do
        key=$(printf %q "$key")
        COMPREPLY+=("${key#"$begun"}")
    done < <("${COMP_WORDS[0]}" ${server:+--server "$server"} completion keys -- "${cur//\\\\/}" 2>/dev/null)
}
__ddb_split() {  # into `words`, at blanks only: bash also parts words at : and =, which keys may have
    local rest=$COMP_LINE word i
    words=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if ((i > 0)) && [[ $rest != [[:blank:]]* ]]; then words[-1]+=$word; else words+=("$word"); fi
        rest=${rest#"${rest%%[![:blank:]]*}"}
        rest=${rest#"$word"}
    done
}
_ddb() {
    local words cur prev command='' server='' skip='' word i
    local position=0
    __ddb_split
    cur=${words[-1]} prev=${words[-2]}
    COMPREPLY=()
    for ((i = 1; i < ${#words[@]} - 1; i++)); do
        word=${words[i]}
        @WALK@
    done
@OFFER@
}
complete -F _ddb ddb
"""

_ZSH: Final = """\
#compdef ddb
# ddb's completion for zsh. In ~/.zshrc, behind compinit: eval "$(ddb completion zsh)"
__ddb_words() { compadd -- ${=1}; }
__ddb_files() { _files; }
__ddb_keys() {
    local -a found
    found=("${(@f)$("${words[1]}" ${server:+--server} ${server:+"$server"} completion keys -- "$cur" 2>/dev/null)}")
    compadd -S '' -- "${(@)found:#}"
}
_ddb() {
    local cur="${(Q)PREFIX}" prev="${words[CURRENT-1]}" command='' server='' skip='' word
    local -i position=0 i
    for ((i = 2; i < CURRENT; i++)); do
        word="${words[i]}"
        @WALK@
    done
@OFFER@
}
compdef _ddb ddb
"""

_WALK: Final = """\
if [[ -n $skip ]]; then
            [[ $skip == --server ]] && server=$word
            skip=''
            continue
        fi
        case "$command $word" in
            @TAKING@) skip=$word ;;
            *" "-?*) ;;
            " "*) command=$word ;;
            *) position=$((position + 1)) ;;
        esac"""


def run(client: Client, args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run `ddb completion`."""
    if args.what == "keys":
        with contextlib.suppress(DdbError):
            for key in levels(client, args.prefix or ""):
                if "\n" not in key:
                    say(key)
    else:
        say(script(args.what, parser).rstrip("\n"))
    return 0


# ----------------------------------------------------------------- scripts


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The completion script for `shell` (bash or zsh)."""
    known = grammar(parser)
    frame = _BASH if shell == "bash" else _ZSH
    walk = _WALK.replace("@TAKING@", _alternatives(_taking(known)))
    return frame.replace("@WALK@", walk).replace("@OFFER@", "\n".join(_offer(known)))


def _usages(known: Grammar) -> Iterator[Usage]:
    yield known.top
    yield from known.commands.values()


def _taking(known: Grammar) -> Iterator[str]:
    """The options that a value follows, each behind its command."""
    for usage in _usages(known):
        for option in usage.options:
            if option.takes_value:
                yield from (f"{usage.name} {flag}" for flag in option.flags)


def _alternatives(texts: Iterable[str]) -> str:
    return "|".join(f'"{text}"' for text in texts)


def _offer(known: Grammar) -> Iterator[str]:
    """What may stand at the cursor: an option's value, an option, an argument."""
    yield '    case "$command $prev" in'
    for usage in _usages(known):
        for option in usage.options:
            if option.takes_value:
                names = _alternatives(f"{usage.name} {flag}" for flag in option.flags)
                yield f"        {names}) {_candidates(option)}; return ;;"
    yield "    esac"
    yield "    if [[ $cur == -* ]]; then"
    yield '        case "$command" in'
    for usage in _usages(known):
        flags = " ".join(flag for option in usage.options for flag in option.flags if flag.startswith("--"))
        yield f'            "{usage.name}") __ddb_words "{flags}" ;;'
    yield "        esac"
    yield "        return"
    yield "    fi"
    yield '    case "$command $position" in'
    yield f'        " 0") __ddb_words "{" ".join(known.commands)}" ;;'
    for usage in known.commands.values():
        for position, positional in enumerate(usage.positionals):
            further = f'|"{usage.name} "*' if positional.many else ""
            yield f'        "{usage.name} {position}"{further}) {_candidates(positional)} ;;'
    yield "    esac"


def _candidates(what: Option | Positional) -> str:
    if what.choices:
        return f'__ddb_words "{" ".join(what.choices)}"'
    if what.metavar in KEYS:
        return "__ddb_keys"
    return "__ddb_files" if what.metavar in FILES else ":"


# -------------------------------------------------------------------- keys


def levels(client: Client, prefix: str) -> Iterator[str]:
    """The next level of each key that begins with `prefix`, in order, and the last of all where there are more than
    CANDIDATES_MAX: what all candidates have in common is then true of all the keys. Raises DdbError."""
    deadline_s = time.monotonic() + COMPLETION_S
    start, end = prefix, prefix_end(prefix)
    for _ in range(CANDIDATES_MAX):
        level = _level(client, prefix, start, end, deadline_s)
        if level is None:
            return
        yield level
        following = prefix_end(level) if level.endswith("/") else level + "\0"
        if following is None:
            return
        start = following
    last = _level(client, prefix, start, end, deadline_s, reverse=True)
    if last is not None:
        yield last


def _level(
    client: Client, prefix: str, start: str, end: str | None, deadline_s: float, reverse: bool = False
) -> str | None:
    """The next level below `prefix` of the first key from `start` on (of the last one below `end`, where `reverse`)."""
    left_s = max(deadline_s - time.monotonic(), 0.001)
    page = client.scan(start=start, end=end, limit=1, keys_only=True, read="stale", reverse=reverse, timeout_s=left_s)
    if not page.items:
        return None
    key = page.items[0].key
    slash = key.find("/", len(prefix))
    return key if slash < 0 else key[: slash + 1]
