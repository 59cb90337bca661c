"""The control socket's server: a thread that talks to clients, and hands what they ask to the thread of the watch.

The target is never touched from here. What is asked waits until the watch takes it, between two rounds; events go out
to who subscribed. Decides who may ask (the same user, and root), and how much: clients, the length of what is not read
yet or not taken, and lines a second are limited, so that none of them, whatever it sends, can hold up the watch.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from patcher.control import place, protocol
from patcher.control.protocol import Call, Fault, Message, Method
from patcher.report import BuildFailed, Event, Note, Working

_CLIENTS = 64
_UNTAKEN = 8  # messages of one client that wait for the watch: no more is read before
_UNREAD = 1 << 20  # bytes for one client, who is then taken to be asleep
_ANSWERED = 1 << 16  # bytes that it has to read before it may ask for more
_LINES_A_SECOND = 200  # of one client
_DEAF_SECONDS = 0.2  # after which a client that was too loud, or could not be accepted, is heard again
_ENDS = {"exited": "ready", "resumed": "paused", "idle": "building"}  # and what they end
_HANG_UP = select.POLLHUP | select.POLLERR | select.POLLNVAL


@dataclass(slots=True)
class Asked:
    """A call that the watch is to do, and the way back for its outcome (a result, or a Fault)."""

    call: Call
    answer: Callable[[Any], None]


@dataclass(slots=True)
class _Open:
    """A message with parts that are not answered yet."""

    message: Message
    outcomes: dict[int, Any]


@dataclass(slots=True)
class _Client:
    connection: socket.socket
    unread: bytes = b""
    outgoing: bytearray = field(default_factory=bytearray)
    untaken: int = 0
    subscribed: bool = False
    wanted: frozenset[str] = frozenset()  # events; empty: all
    listens: bool = True  # to what it says; else it is left once it has its answers
    second: float = 0.0
    lines: int = 0  # in that second

    def is_loud(self, now: float) -> bool:
        """Tell whether it has said enough for this second."""
        if now - self.second >= 1:
            self.second, self.lines = now, 0
        return self.lines >= _LINES_A_SECOND

    def may_say_more(self) -> bool:
        return self.listens and b"\n" not in self.unread and self.is_answered()

    def is_answered(self) -> bool:
        """Tell whether it has, and took, the answers to most of what it asked."""
        return self.untaken < _UNTAKEN and len(self.outgoing) < _ANSWERED


class Control:
    """A watch's control socket. A Reporter as well: what it is told goes to who subscribed.

    `listen` begins; `take` and the answers of what it returns are for the thread of the watch.
    """

    def __init__(self) -> None:
        self._news: deque[Callable[[], None]] = deque()  # to be done by the server's thread
        self._asked: deque[Asked] = deque()
        self._lock = threading.Lock()
        self._wake: Callable[[], None] | None = None  # the watch; None: there is none now
        self._recorded: list[list[dict[str, Any]]] = []
        self._thread: threading.Thread | None = None
        self._bell = -1
        self._listener: socket.socket | None = None
        self._directory = -1
        self._pid = 0
        self._clients: dict[int, _Client] = {}
        self._standing: dict[str, dict[str, Any]] = {}  # events that are still so
        self._deaf_until = 0.0
        self._ending = False

    # --- for the thread of the watch --------------------------------------------------------------------------

    def listen(self, pid: int, wake: Callable[[], None]) -> None:
        """Take what is asked of the watch of a process from now on; `wake` is called, from another thread, for each.

        Raises `NoControl` where there can be no socket.
        """
        if self._pid != pid:
            self._move(pid)
        with self._lock:
            self._wake = wake
        if self._thread is None:
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
            self._thread.start()

    def away(self) -> None:
        """Answer everything that is asked, from now until `listen`, with: there is no process to watch."""
        with self._lock:
            self._wake = None
            left = [*self._asked]
            self._asked.clear()
        for asked in left:
            asked.answer(_NO_PROCESS)

    def take(self) -> Asked | None:
        """Return what is to be done next, if there is anything."""
        with self._lock:
            return self._asked.popleft() if self._asked else None

    def emit(self, event: Event) -> None:
        """Tell an event to who subscribed, and notes as well."""
        if isinstance(event, Working):
            steps = {"done": event.done, "total": event.total, "seconds": event.seconds, "ended": event.ended}
            self.tell("working", text=event.text, time=event.time, **steps)
        elif isinstance(event, Note):
            self.tell("note", text=event.text, time=event.time)
        else:
            found = event.as_json()
            if isinstance(event, BuildFailed):
                found["coloured"] = event.diagnostics
            self._tell(found)

    def tell(self, name: str, **fields: object) -> None:
        """Tell something that is no event of a session, but of its watch."""
        self._tell({"event": name, "time": time.time(), **fields})

    @contextmanager
    def recorded(self) -> Iterator[list[dict[str, Any]]]:
        """Yield a list that gets what is told within the block."""
        found: list[dict[str, Any]] = []
        self._recorded.append(found)
        try:
            yield found
        finally:
            self._recorded.remove(found)

    def close(self) -> None:
        """End: what was told and answered goes out first, as far as it is read."""
        self.away()
        thread, self._thread = self._thread, None
        if thread is not None:
            self._post(self._end)
            thread.join()
            os.close(self._bell)
        if self._listener is not None:
            self._unlisten(self._listener, self._directory, self._pid)
            self._listener = None

    def _tell(self, event: dict[str, Any]) -> None:
        for found in self._recorded:
            found.append(event)
        if self._thread is not None:
            self._post(partial(self._publish, event))

    def _move(self, pid: int) -> None:
        """Listen for a process, instead of for the one before it."""
        directory = place.made(next(place.places(os.geteuid())))
        try:
            listener = place.listening(directory, pid)
        except OSError as error:
            os.close(directory)
            raise place.NoControl(f"the control socket cannot be made: {error.strerror}") from None
        except place.NoControl:
            os.close(directory)
            raise
        before = (self._listener, self._directory, self._pid)
        self._listener, self._directory, self._pid = listener, directory, pid
        if before[0] is not None:
            self._post(partial(self._unlisten, before[0], *before[1:]))

    @staticmethod
    def _unlisten(listener: socket.socket, directory: int, pid: int) -> None:
        place.removed(directory, pid)
        listener.close()
        os.close(directory)

    def _post(self, action: Callable[[], None]) -> None:
        self._news.append(action)
        self._ring()

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)

    # --- the server's thread ----------------------------------------------------------------------------------

    def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the other threads
        while not self._ending:
            self._look()
            while self._news:
                self._news.popleft()()

    def _look(self) -> None:
        """Wait until somebody has something for us, or takes something of ours, and do that."""
        poll, now, deaf = select.poll(), time.monotonic(), False
        poll.register(self._bell, select.POLLIN)
        listener = self._listener
        if listener is not None and now >= self._deaf_until:
            poll.register(listener, select.POLLIN)
        for client in [*self._clients.values()]:
            if not client.is_loud(now):
                self._understand(client)  # what there was no room for
        for client in self._clients.values():
            loud = client.is_loud(now)
            deaf |= loud
            reads = select.POLLIN if client.may_say_more() and not loud else 0
            poll.register(client.connection, reads | (select.POLLOUT if client.outgoing else 0))
        waits = deaf or now < self._deaf_until
        for descriptor, happened in poll.poll(_DEAF_SECONDS * 1e3 if waits else None):
            if descriptor == self._bell:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._bell)
            elif descriptor in self._clients:
                self._attend(self._clients[descriptor], happened)
            elif listener is not None:
                self._accept(listener)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptors left, or the process is another one now
            self._deaf_until = time.monotonic() + _DEAF_SECONDS
            return
        connection.setblocking(False)
        refusal = ""
        if place.peer(connection) not in (os.geteuid(), 0):
            refusal = "this watch is another user's"
        elif len(self._clients) >= _CLIENTS:
            refusal = f"there are {_CLIENTS} connections already"
        if refusal:
            fault = Fault(protocol.FAILED, refusal, {"reason": "no-control", "hint": ""})
            with suppress(OSError):
                connection.send(protocol.written([protocol.answer(fault, fault)], batch=False))
            connection.close()
        else:
            self._clients[connection.fileno()] = _Client(connection)

    def _attend(self, client: _Client, happened: int) -> None:
        try:
            if happened & select.POLLOUT:
                del client.outgoing[: client.connection.send(client.outgoing)]
            if happened & select.POLLIN:
                self._hear(client)
            elif happened & _HANG_UP:
                self._drop(client)
                return
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        self._leave_if_done(client)

    def _hear(self, client: _Client) -> None:
        part = client.connection.recv(protocol.LINE_LIMIT)
        client.listens = bool(part)
        client.unread += part or (b"\n" if client.unread else b"")
        self._understand(client)

    def _understand(self, client: _Client) -> None:
        """Take the lines that a client has said, as many as it may say now."""
        while b"\n" in client.unread and client.is_answered() and client.lines < _LINES_A_SECOND:
            line, _, client.unread = client.unread.partition(b"\n")
            client.lines += 1
            if line.strip():
                self._begin(client, protocol.read(line) if len(line) <= protocol.LINE_LIMIT else protocol.too_long())
        if len(client.unread) > protocol.LINE_LIMIT and b"\n" not in client.unread:
            client.unread = b""
            client.listens = False
            self._begin(client, protocol.too_long())

    def _begin(self, client: _Client, message: Message) -> None:
        """Answer what can be answered here, and hand on the rest."""
        open_ = _Open(message, {})
        client.untaken += 1
        for index, part in enumerate(message.parts):
            if isinstance(part, Fault):
                open_.outcomes[index] = part
            elif part.method is Method.SUBSCRIBE:
                open_.outcomes[index] = self._subscribe(client, part)
            else:
                self._hand_on(client, open_, index, part)
        self._finish_if_done(client, open_)

    def _subscribe(self, client: _Client, call: Call) -> dict[str, bool]:
        """Take note of what a client wants to hear, beginning with how things are."""
        client.subscribed = True
        client.wanted = frozenset(call.parameters.get("events", ()))
        for event in self._standing.values():
            self._tell_client(client, event)
        return {"subscribed": True}

    def _hand_on(self, client: _Client, open_: _Open, index: int, call: Call) -> None:
        def answer(outcome: Any) -> None:
            self._post(partial(self._done, client, open_, index, outcome))

        with self._lock:
            wake = self._wake
            if wake is not None:
                self._asked.append(Asked(call, answer))
        if wake is None:
            open_.outcomes[index] = _NO_PROCESS
        else:
            wake()

    def _done(self, client: _Client, open_: _Open, index: int, outcome: Any) -> None:
        open_.outcomes[index] = outcome
        self._finish_if_done(client, open_)

    def _finish_if_done(self, client: _Client, open_: _Open) -> None:
        parts = open_.message.parts
        if len(open_.outcomes) < len(parts):
            return
        client.untaken -= 1
        answers = [protocol.answer(part, open_.outcomes[index]) for index, part in enumerate(parts)]
        self._send(client, protocol.written(answers, open_.message.batch))
        if client.connection.fileno() in self._clients:
            self._leave_if_done(client)

    def _publish(self, event: dict[str, Any]) -> None:
        name = event["event"]
        if name in _ENDS:
            self._standing.pop(_ENDS[name], None)
        elif name in _ENDS.values():
            self._standing[name] = event
        for client in [*self._clients.values()]:
            if client.subscribed:
                self._tell_client(client, event)

    def _tell_client(self, client: _Client, event: dict[str, Any]) -> None:
        if not client.wanted or event["event"] in client.wanted:
            self._send(client, protocol.notification("event", event))

    def _send(self, client: _Client, line: bytes) -> None:
        client.outgoing += line
        if len(client.outgoing) > _UNREAD:
            self._drop(client)

    def _leave_if_done(self, client: _Client) -> None:
        if client.listens or client.subscribed or client.untaken or client.outgoing or client.unread:
            return
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._clients.pop(client.connection.fileno(), None)
        client.connection.close()

    def _end(self) -> None:
        self._ending = True
        for client in [*self._clients.values()]:
            with suppress(OSError):
                client.connection.send(client.outgoing)
            self._drop(client)


_NO_PROCESS = Fault(protocol.FAILED, "there is no process now", {"reason": "target-gone", "hint": "ask again later"})
