"""The security fixes of Debian's redis package that the run applies, and how a client tells that one is in.

A probe asks a server in a way that is harmless with and without the fix: it neither crashes nor corrupts an unfixed
server. `old` and `new` are regular expressions for the whole answer. Checks are asked only once the fix is in: without
it they would do damage, or answer the same.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .redis_client import RedisClient

Question = Callable[[Path], str]


@dataclass(frozen=True, slots=True)
class Probe:
    """A question with another answer before the fix than after it."""

    question: Question
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Fix:
    """One patch file of the package: found by a part of its name, known by functions it changes."""

    name: str
    file_name_part: str
    functions: tuple[str, ...]
    probes: tuple[Probe, ...] = ()
    checks: tuple[tuple[Question, str], ...] = ()

    def patch(self, patches: Path) -> Path:
        """Find the patch file through the series; the message of a failure names what the package has."""
        series = (patches / "series").read_text().split()
        found = [name for name in series if self.file_name_part in name]
        assert len(found) == 1, f"{len(found)} patches of the package are called *{self.file_name_part}*: {series}"
        return patches / found[0]


def apply(patch: Path, root: Path, *, reverse: bool = False) -> tuple[str, ...]:
    """Apply a patch file's changes to the program's own sources, by patch(1); return the files it wrote.

    Changes of the package's test-suite are left out: they concern no program, and depend on patches not applied here.
    """
    text = _program_changes(patch.read_bytes())
    command = ["patch", "-p1", "--batch", "--no-backup-if-mismatch", "-d", str(root), *(["-R"] if reverse else [])]
    done = subprocess.run(command, input=text, capture_output=True, check=False)
    output = done.stdout.decode(errors="replace")
    assert done.returncode == 0, f"{patch.name} does not apply:\n{output}"
    return tuple(re.findall(r"(?m)^patching file '?(\S+?)'?$", output))


def _program_changes(patch: bytes) -> bytes:
    """Keep the file sections of a unified diff whose file lies in src/ or deps/."""
    sections = re.split(rb"(?m)^(?=--- \S.*\n\+\+\+ \S)", patch)[1:]
    kept = [section for section in sections if re.match(rb".*\n\+\+\+ [^/\s]+/(src|deps)/", section)]
    assert kept, "the patch changes no source of the program"
    # What stands between two sections announces the next one, and patch(1) would believe it.
    return b"".join(re.split(rb"(?m)^diff --git ", section)[0] for section in kept)


def _asking(*commands: tuple[str | bytes | int, ...]) -> Question:
    """Ask the commands on a connection of their own; the answer is that to the second last, the last tidies up."""

    def question(path: Path) -> str:
        with RedisClient(path) as client:
            replies = [client(*command) for command in commands]
        return str(replies[-2])

    return question


def _evaluating(script: str) -> Question:
    return _asking(("EVAL", script, 0), ("PING",))


def _unauthenticated_flood(path: Path) -> str:
    """Let a client that never logged in ask 2,000 times before it reads the first refusal."""
    with RedisClient(path) as administrator:
        administrator("CONFIG", "SET", "requirepass", "a password for the length of a probe")
        try:
            with RedisClient(path) as stranger:
                # Inline commands of 14 kB: the server reads them at one go and owes 68 kB of replies after it.
                stranger.socket.sendall(b"GET x\r\n" * 2000)
                return "all refused, none cut off" if _refusals(stranger) == 2000 else "other replies"
        except ConnectionError:
            return "cut off"
        finally:
            administrator("CONFIG", "SET", "requirepass", "")


def _refusals(client: RedisClient) -> int:
    return sum(client.line().startswith(b"-NOAUTH") for _ in range(2000))


def _reply_with_line_break(path: Path) -> str:
    """Take the raw answer to an argument that has a line break in it, up to the answer to a PING behind it."""
    with RedisClient(path) as client:
        client.send([("FUNCTION", "LIST", "one\r\ntwo"), ("PING",)])
        lines = []
        while (line := client.line()) != b"+PONG\r\n":
            lines.append(line.decode())
        return repr("".join(lines))


# Runs of 16,384 registers whose sum is 2^32 + 16,384: a 32-bit sum says 16,384, the only length that is valid.
_HLL_HEADER = b"HYLL" + bytes([1, 0, 0, 0]) + bytes(7) + b"\x80"  # sparse; the cached cardinality marked stale
_OVERFLOWING_HLL = _HLL_HEADER + b"\x7f\xff" * (2**18 + 1)

BODY_FIXES = (
    Fix(
        name="CVE-2024-31449, 31227, 31228: bit.tohex, ACL selectors, pattern matching",
        file_name_part="Apply-security-fixes-for-CVEs",
        functions=("bit_tohex", "ACLSetSelector", "stringmatchlen"),
        probes=(
            Probe(
                _asking(("ACL", "SETUSER", "probe", "%~"), ("ACL", "DELUSER", "probe")),
                old="b'OK'",
                new=r"ERR Error in ACL SETUSER modifier '%~': Syntax error",
            ),
            Probe(  # 1,500 stars nest 1,500 calls deep: more than the 1,000 of the fix, far from the end of a stack
                _asking(("SELECT", 9), ("SET", "a" * 1500, 1), ("KEYS", "*?" * 1500), ("DEL", "a" * 1500)),
                old=r"\[b'a{1500}'\]",
                new=r"\[\]",
            ),
        ),
        checks=((_evaluating("return bit.tohex(65535, -2147483648)"), "b'0000FFFF'"),),
    ),
    Fix(
        name="CVE-2024-46981: collect garbage before the script engine closes",
        file_name_part="CVE-2024-46981",
        functions=("scriptingRelease",),
        checks=((_asking(("SCRIPT", "FLUSH", "SYNC"), ("PING",)), "b'OK'"), (_evaluating("return 'new'"), "b'new'")),
    ),
    Fix(
        name="CVE-2024-51741: key permissions without a pattern",
        file_name_part="CVE-2024-51741",
        functions=("ACLSetSelector",),
        probes=(
            Probe(
                _asking(("ACL", "SETUSER", "probe", "%"), ("ACL", "DELUSER", "probe")),
                old="b'OK'",
                new=r"ERR Error in ACL SETUSER modifier '%': Syntax error",
            ),
        ),
    ),
    Fix(
        name="CVE-2025-21605: output for clients that did not log in",
        file_name_part="Limiting-output-buffer-for-unauthenticated-client",
        functions=("checkClientOutputBufferLimits",),
        probes=(Probe(_unauthenticated_flood, old="all refused, none cut off", new="cut off"),),
    ),
    Fix(
        name="CVE-2025-32023: run lengths of a HyperLogLog overflow",
        file_name_part="CVE-2025-32023",
        functions=("hllSparseToDense", "hllMerge", "hllSparseRegHisto"),
        probes=(
            Probe(
                _asking(("SELECT", 9), ("SET", "h", _OVERFLOWING_HLL), ("PFCOUNT", "h"), ("DEL", "h")),
                old=r"\d+",
                new="INVALIDOBJ Corrupted HLL object detected",
            ),
        ),
    ),
    Fix(
        name="CVE-2025-46817: unpack with extreme ranges",
        file_name_part="CVE-2025-46817",
        functions=("luaB_unpack", "luaH_getnum"),
        checks=(
            (_evaluating("return {unpack({1,2,3}, 0, 2147483647)}"), ".*too many results to unpack.*"),
            (_evaluating("return {unpack({1,2,3}, 2, 3)}"), r"\[2, 3\]"),
        ),
    ),
    Fix(
        name="CVE-2025-49844: the parser's chunk name is collected",
        file_name_part="CVE-2025-49844",
        functions=("luaY_parser",),
        checks=((_evaluating("return 'parsed by the new parser'"), "b'parsed by the new parser'"),),
    ),
    Fix(
        name="CVE-2025-46819: long brackets",
        file_name_part="CVE-2025-46819",
        functions=("luaX_setinput",),
        checks=(
            (_evaluating("return [==[ ]=] ]==]"), "b' ]=] '"),
            (_evaluating("return [==text"), ".*invalid long string delimiter.*"),
        ),
    ),
)

# These add a prototype to a header and a function that several units call: one generation across units.
CROSS_UNIT_FIXES = (
    Fix(
        name="CVE-2025-48367: go on accepting after a failed connection",
        file_name_part="CVE-2025-48367",
        functions=("anetAcceptFailureNeedsRetry", "acceptTcpHandler", "acceptUnixHandler"),
        checks=((_asking(("PING",), ("PING",)), "b'PONG'"),),
    ),
    Fix(
        name="CVE-2025-67733: line breaks in errors and status replies",
        file_name_part="CVE-2025-67733",
        functions=("addReplyErrorSdsExSafe", "addReplyStatusSafe", "functionListCommand"),
        probes=(
            Probe(
                _reply_with_line_break,
                old=re.escape(repr("-ERR Unknown argument one\r\ntwo\r\n")),
                new=re.escape(repr("-ERR Unknown argument one  two\r\n")),
            ),
        ),
    ),
)

# A new member in `struct redisServer`, of which the live server has one: no running process can take this as it is.
LAYOUT_FIX = Fix(
    name="CVE-2025-46818: scripts that run in another user's context",
    file_name_part="CVE-2025-46818",
    functions=(),
)


def wrong_answers(path: Path, questions: Iterable[tuple[Question, str]]) -> list[str]:
    """Ask questions; say of each answer that is not the expected one what was expected and what came."""
    answers = [(expected, question(path)) for question, expected in questions]
    return [f"expected {want!r}, got {got[:300]!r}" for want, got in answers if not re.fullmatch(want, got, re.DOTALL)]
