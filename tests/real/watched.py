"""Programs as people have them, each with what to ask it and what to edit in it, for one day of work in watch mode.

A row of `PROGRAMS` is all that there is of a program: how it is built (`trees`), how `patcher` gets to it, where it is
expected to find the compile commands, how the program is asked, and the edits with the answers that they change.
"""

from __future__ import annotations

import contextlib
import getpass
import http.server
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .trees import LUA, MEMCACHED, MOSQUITTO, REDIS, TINYPROXY, Recipe

SECONDS = 20


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of one place in one file, and what is in the answers that it changes, and was not before."""

    file: str
    old: str
    new: str
    answers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """What one run of a program has to itself: a directory, a port, and a server of web pages behind it."""

    directory: Path
    port: int
    pages: int  # the port of the server that `pages` runs

    @property
    def socket(self) -> Path:
        return self.directory / "socket"

    def write(self, name: str, text: str) -> Path:
        """Write a file of the run, with what belongs to it filled in, and return its path."""
        path = self.directory / name
        path.write_text(text.format(socket=self.socket, port=self.port, directory=self.directory))
        return path


@dataclass(frozen=True, slots=True)
class Program:
    """A program; `units` are those that the edit of the header has to change together."""

    recipe: Recipe
    spawned: bool
    commands_from: str  # a pattern of what `patcher doctor` says of that
    arguments: Callable[[Place], tuple[object, ...]]
    ask: Callable[[subprocess.Popen[bytes], Place, str], str]
    header: Edit
    units: frozenset[str]
    broken: Edit  # does not compile
    mended: Edit
    questions: tuple[str, ...]  # besides those whose answers change

    @property
    def name(self) -> str:
        return Path(self.recipe.program).name

    @property
    def all_questions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.header.answers, *self.mended.answers, *self.questions)))


def exchanged(address: str | tuple[str, int], request: bytes) -> bytes:
    """Send a request that ends with the wish to part, and return all that comes until the other side does."""
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family) as connection:
        connection.settimeout(SECONDS)
        connection.connect(address)
        connection.sendall(request)
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def pages() -> Iterator[int]:
    """Serve pages that tell through whom they were asked for; the block gets the port."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response_only(200)
        self.end_headers()
        self.wfile.write(f"asked for {self.path} via {self.headers['Via']}".encode())

    def log_message(self, *_: object) -> None:
        """Stay silent."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- lua: lines for its prompt --------------------------------------------------------------------------------------


def ask_lua(process: subprocess.Popen[bytes], _: Place, question: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"print('answer', {question})\n".encode())
    process.stdin.flush()
    for line in process.stdout:
        if b"answer\t" in line:  # behind the prompt, after the greeting
            return line.split(b"\t", 1)[1].decode().rstrip("\n")
    raise AssertionError(f"lua ended before it answered {question!r}")


DIGIT = "tonumber('0x1g')"
ESCAPE = "pcall(load([[return ('\\x1g'):byte()]]) or error)"
MISTAKE = "select(2, pcall(string.rep))"
SCRIPT = "load('local n = 0 for i = 1, 1000 do n = n + i % 7 end return n')()"

IN_LUA = Program(
    recipe=LUA,
    spawned=True,
    commands_from=r"/src/Makefile \(make -n\)",
    arguments=lambda place: ("-i",),
    ask=ask_lua,
    # what digits there are is known to who reads programs, and to who reads numbers
    header=Edit(
        "src/lctype.h",
        "#define lisxdigit(c)	testprop(c, MASK(XDIGITBIT))",
        "#define lisxdigit(c)	(testprop(c, MASK(XDIGITBIT)) || (c) == 'g')",
        {DIGIT: "32", ESCAPE: "true\t32"},
    ),
    units=frozenset({"llex.c", "lobject.c"}),
    broken=Edit("src/lauxlib.c", '"bad argument #%d to', '"argument %d does not fit" to'),
    mended=Edit(
        "src/lauxlib.c",
        '"argument %d does not fit" to',
        '"argument %d does not fit',
        {MISTAKE: "argument 1 does not fit 'string.rep' (string expected, got no value)"},
    ),
    questions=("_VERSION", "7 // 2, 7 % 3", "0xff + 2^10", SCRIPT, "string.format('%5.1f', 3.14159)"),
)


# --- redis: inline commands, parted by semicolons -------------------------------------------------------------------


def ask_redis(_: subprocess.Popen[bytes], place: Place, question: str) -> str:
    request = question.replace(";", "\r\n") + "\r\nQUIT\r\n"
    return exchanged(str(place.socket), request.encode()).decode().removesuffix("+OK\r\n")


FAR_NORTH = "GEOADD places 13 87 there; GEOHASH places there; DEL places"
IN_THE_NORTH = "ZADD places 3848264172205431 there; GEOPOS places there; DEL places"
NO_BIT = "SETBIT bits -1 1"

IN_REDIS = Program(
    recipe=REDIS,
    spawned=True,
    commands_from=r"/src/Makefile \(make -n\)",
    arguments=lambda place: (
        *("--port", 0, "--unixsocket", place.socket, "--save", "", "--dir", place.directory),
        *("--logfile", place.directory / "log"),
    ),
    ask=ask_redis,
    header=Edit(
        "src/geohash.h",
        "#define GEO_LAT_MAX 85.05112878",
        "#define GEO_LAT_MAX 89.0",
        {FAR_NORTH: ":1\r\n*1\r\n$11\r\n", IN_THE_NORTH: "\r\n50.5538"},
    ),
    units=frozenset({"geo.c", "geohash.c"}),
    broken=Edit("src/bitops.c", '"bit offset is not an integer or out of range"', "OUT_OF_RANGE"),
    mended=Edit("src/bitops.c", "OUT_OF_RANGE", '"there is no such bit"', {NO_BIT: "-ERR there is no such bit\r\n"}),
    questions=(
        "PING",
        "SET counter 41; INCR counter; OBJECT ENCODING counter",
        "DEL s; ZADD s 1 one 2 two; ZRANGEBYSCORE s 2 3",
    ),
)


# --- memcached: requests of its text protocol, and one of the other -------------------------------------------------


def ask_memcached(_: subprocess.Popen[bytes], place: Place, question: str) -> str:
    if question.startswith("binary "):
        key = question.removeprefix("binary ").encode()
        get = b"\x80\x00" + len(key).to_bytes(2) + bytes(4) + len(key).to_bytes(4) + bytes(12) + key
        return exchanged(str(place.socket), get + b"\x80\x07" + bytes(22)).hex(" ")
    return exchanged(str(place.socket), question.replace(";", "\r\n").encode() + b"\r\nquit\r\n").decode()


LONG = 150 * "k"
AS_ROOT = ("-u", getpass.getuser()) if os.geteuid() == 0 else ()

IN_MEMCACHED = Program(
    recipe=MEMCACHED,
    spawned=False,
    commands_from=r"/Makefile \(make -n\)",
    arguments=lambda place: ("-t", 2, "-s", place.socket, *AS_ROOT),
    ask=ask_memcached,
    header=Edit(
        "memcached.h",
        "#define KEY_MAX_LENGTH 250",
        "#define KEY_MAX_LENGTH 100",
        {f"get {LONG}": "CLIENT_ERROR bad command line format\r\n", f"binary {LONG}": "81 00 00 00 00 00 00 04"},
    ),
    units=frozenset({"proto_text.c", "proto_bin.c"}),
    broken=Edit("proto_text.c", 'out_string(c, "VERSION " VERSION);', 'out_string(c, "VERSION " VERSION;'),
    mended=Edit(
        "proto_text.c",
        'out_string(c, "VERSION " VERSION;',
        'out_string(c, "VERSION " "patched");',
        {"version": "VERSION patched\r\n"},
    ),
    questions=(
        "set a 0 0 5;value;get a",
        "set n 0 0 1;7;incr n 5;decr n 100",
        "touch nothing 0",
        "set b -1 0 1;x",
        "binary nothing",
    ),
)


# --- tinyproxy: pages asked for through it --------------------------------------------------------------------------


def ask_tinyproxy(_: subprocess.Popen[bytes], place: Place, question: str) -> str:
    method, url, *more = question.format(pages=place.pages).split(" ", 2)
    request = f"{method} {url} HTTP/1.0\r\n{''.join(more)}\r\n\r\n"
    answer = exchanged(("127.0.0.1", place.port), request.encode()).decode()
    return re.sub(r"(?m)^Date: .*\r\n|\d+(?=:\d\d:\d\d)", "", answer).replace(str(place.pages), "PAGES")


TINYPROXY_CONFIGURATION = """\
Port {port}
Listen 127.0.0.1
LogFile "{directory}/tinyproxy.log"
MaxClients 20
ViaProxyName "here"
"""
COPIED = """\
#  define safestrdup(x) copied (x)
static __inline__ char *copied (const char *text)
{
        return strdup (strcmp (text, "/page") && strcmp (text, "Unable to connect") ? text : "/elsewhere");
}
"""
PAGE = "GET http://127.0.0.1:{pages}/page"
UNREACHABLE = "GET http://127.0.0.1:1/"
IN_TINYPROXY = Program(
    recipe=TINYPROXY,
    spawned=True,
    commands_from=r"debug information of .*/installed/bin/tinyproxy",
    arguments=lambda place: ("-d", "-c", place.write("tinyproxy.conf", TINYPROXY_CONFIGURATION)),
    ask=ask_tinyproxy,
    header=Edit(
        "src/heap.h",
        "#  define safestrdup(x) strdup(x)\n",
        COPIED,
        {PAGE: "asked for /elsewhere", UNREACHABLE: "500 /elsewhere"},
    ),
    units=frozenset({"reqs.c", "html-error.c"}),
    broken=Edit("src/transparent-proxy.c", '"You tried to connect to the "', '"You came back to the'),
    mended=Edit(
        "src/transparent-proxy.c",
        '"You came back to the',
        '"You came back to the "',
        {"GET nowhere": "You came back to the machine"},
    ),
    questions=("GET http://127.0.0.1:{pages}/other Via: 1.0 before",),
)


# --- mosquitto: packets of MQTT, by the version of 2014 -------------------------------------------------------------


def ask_mosquitto(_: subprocess.Popen[bytes], place: Place, question: str) -> str:
    packets = [packet(*words.split()) for words in question.split(";")]
    return exchanged(str(place.socket), b"".join([*packets, b"\xe0\x00"])).hex(" ")


def packet(kind: str, *words: str) -> bytes:
    """Make a packet: `connect NAME LEVEL`, `subscribe TOPIC QUALITY`, `publish TOPIC TEXT`, `ping`."""
    match kind:
        case "connect":
            body = text(words[0]) + bytes([int(words[1]), 2, 0, 60]) + text("somebody")
            head = 0x10
        case "subscribe":
            head, body = 0x82, b"\x00\x07" + text(words[0]) + bytes([int(words[1])])
        case "publish":
            head, body = 0x30, text(words[0]) + words[1].encode()
        case _:
            head, body = 0xC0, b""
    return bytes([head, len(body)]) + body


def text(value: str) -> bytes:
    return len(value).to_bytes(2) + value.encode()


MOSQUITTO_CONFIGURATION = """\
listener 0 {socket}
allow_anonymous true
user root
log_dest file {directory}/mosquitto.log
"""
ACCEPTED, REFUSED = "20 02 00 00", "20 02 00 01"

IN_MOSQUITTO = Program(
    recipe=MOSQUITTO,
    spawned=False,
    commands_from=r"/build/compile_commands\.json",
    arguments=lambda place: ("-c", place.write("mosquitto.conf", MOSQUITTO_CONFIGURATION)),
    ask=ask_mosquitto,
    header=Edit(
        "include/mqtt_protocol.h",
        '#define PROTOCOL_NAME "MQTT"',
        '#define PROTOCOL_NAME "NEXT"',
        {"connect NEXT 4": ACCEPTED, "connect NEXT 9": REFUSED},
    ),
    units=frozenset({"handle_connect.c", "send_connect.c"}),
    broken=Edit(
        "src/handle_subscribe.c", "				qos = subscription_options;\n", "				qos = granted;\n"
    ),
    mended=Edit(
        "src/handle_subscribe.c",
        "				qos = granted;\n",
        "				qos = subscription_options > 1 ? 1 : subscription_options;\n",
        {"connect MQIsdp 3; subscribe a/b 2; publish a/b text; ping": "90 03 00 07 01"},
    ),
    questions=("connect MQIsdp 3; ping", "connect MQIsdp 9", "connect other 4"),
)


PROGRAMS = (IN_LUA, IN_REDIS, IN_MEMCACHED, IN_TINYPROXY, IN_MOSQUITTO)
