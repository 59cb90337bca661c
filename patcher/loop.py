r"""Saves, one round after another: what is saved together goes live together, or is reported and stays pending.

    saved --> touched --> build --> match, link, flip --> applied | unchanged
                |           |            \-> refused       stays as it is, in nobody's way, until it can go
                |           \-> failed                     stays pending, and holds what is saved meanwhile
                \-----------\-> saved again meanwhile      cancelled: the next round has everything

What may happen to a file between saves is written down in `edits`; what a saved header makes of units, in `touched`.
A round tries everything that is pending, as one generation; if that does not go, the same without what was refused
before. Decides the order of these steps and what is told of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from patcher.build import BuildCancelled, BuildCommand, is_unit
from patcher.control import FAILED, Call, Control, Fault, Method
from patcher.edits import Edits, State
from patcher.errors import (
    BuildError,
    LinkError,
    NoCompileCommand,
    ObjectError,
    PatcherError,
    TargetBusy,
    TargetGone,
    UnsafeChange,
)
from patcher.ignored import IGNORE, Ignored
from patcher.options import Options
from patcher.outcome import Generation
from patcher.report import BuildFailed, Note, Ready, Refused, Reverted, Saved, Work
from patcher.session import Session
from patcher.units import Source, Standing
from patcher.watch import Watcher, gathered, git_lock, is_build_file, source_filter

Pending = Callable[[], bool]

_TICK_SECONDS = 0.5
_GIVEN_UP_TICK_SECONDS = 0.02
_BUSY_SECONDS = 1.0  # another patcher needs the process for less
_BUSY_POLL_SECONDS = 0.02
_NAMED = 4
_ASKED_AT_ONCE = 4
_OF_THE_CHANGE = (UnsafeChange, LinkError, ObjectError)  # another process takes it, if it is built of it


def saves_wanted(options: Options, paths: Sequence[Path]) -> Ignored:
    """Return the filter of the saves below some paths that count. Raises `PatcherError` for a glob that is none."""
    globs_from = options.ignore_from or Path.cwd()
    return Ignored(paths, source_filter(), globs=options.ignore, globs_from=globs_from, git=options.gitignore)


def builder_of(options: Options, paths: Sequence[Path]) -> BuildCommand | None:
    """Return the user's own build, of what is watched at some paths; None without --build."""
    if not options.build:
        return None
    roots = [p.resolve() for p in paths]
    return BuildCommand(options.build, directory=options.build_in or Path.cwd(), objects_in=roots)


class Loop:
    """Watches for one session."""

    def __init__(
        self,
        session: Session,
        paths: Sequence[Path],
        *,
        wanted: Ignored | None = None,
        builder: BuildCommand | None = None,
        restarted_if_refused: bool = False,
        control: Control | None = None,
    ) -> None:
        """`wanted` is the filter of whatever watches the paths, `builder` the user's own build; by default as the
        session's options say.

        `restarted_if_refused`: a refused change ends a watch, for the program to be started again with it. What
        `control` is asked is done between rounds.
        """
        self._control = control
        self.paused = False
        self._held: frozenset[Path] = frozenset()  # saved while it was paused
        self.session = session
        self.wants_restart = False
        self._begun: Session | None = None  # what is ready
        self._restarted = False  # and what was pending is to be tried at once
        self._given_up = False  # a round, for something that was being saved: there may be nothing to follow
        self._restarted_if_refused = restarted_if_refused
        self.paths = tuple(paths)
        self._wanted = wanted if wanted is not None else saves_wanted(session.options, paths)
        self.edits = Edits()
        self._built: set[Path] = set()  # what compiled at least once: its command is right
        self._left = 0  # the generation that we left live
        self._commands: dict[str, int] = {}  # the databases that commands came from, as they were
        self._fresh: frozenset[Path] = frozenset()  # the objects that the user's build made last
        self._told: set[str] = set()  # whose rules were told of
        self._background: dict[str, tuple[Work, int]] = {}  # what is done there, and of how many steps
        self._builder = builder if builder is not None else builder_of(session.options, paths)

    def run(self, stop: threading.Event) -> None:
        """Apply every save until `stop` is set. Raises `TargetGone` when the process ends."""
        with Watcher(self.paths, stop=stop, is_source=self._wanted) as watcher:
            self.watch(watcher, stop)

    def watch(self, watcher: Watcher, stop: threading.Event) -> None:
        """Apply every save until `stop` is set, or a restart is wanted. Raises `TargetGone` when the process ends."""
        session = self.session
        if self._begun is not session:
            self._begin(watcher)
        lock = git_lock(self.paths)
        if self._restarted and self.edits.core():
            self._go(_Round(time.perf_counter(), 0.0, watcher.pending))
        self._restarted = False
        try:
            self._attend(watcher, stop, lock)
        finally:
            self._tell_of_background(())

    def _attend(self, watcher: Watcher, stop: threading.Event, lock: Pending) -> None:
        session = self.session
        while not stop.is_set() and not self.wants_restart:
            saved = watcher.next(_GIVEN_UP_TICK_SECONDS if self._given_up and not self.paused else _TICK_SECONDS)
            self._say_left_out()
            self._tell_of_background(session.in_background())
            if saved is None:
                return
            if saved and self.paused:
                self._hold(saved)
            elif saved:
                self.round(self._with_others(watcher, saved, lock), watcher.pending)
            else:
                session.target.check_alive()
                if not self.paused:
                    self._look_at_commands(watcher.pending)
                    if self._given_up and not watcher.pending():  # it was a temporary file
                        self._go(_Round(time.perf_counter(), 0.0, watcher.pending))
            if self._control is not None:
                self._obey(self._control, watcher)

    def _with_others(self, watcher: Watcher, saved: frozenset[Path], lock: Pending) -> frozenset[Path]:
        if len(saved) == 1:
            return saved
        with self.session.working("waiting until all files are saved"):
            return gathered(watcher, saved, lock)

    def _tell_of_background(self, works: Iterable[tuple[str, int]]) -> None:
        """Have it told how far the work in the background has come; what is not among `works` is over."""
        left = {what: count for what, count in works if count}
        for what in [w for w in self._background if w not in left]:
            self._background.pop(what)[0].end()
        for what, count in left.items():
            work, total = self._background.get(what) or (self.session.working(what).begin(), 0)
            total = max(total, count)
            work.update(total - count, total)
            self._background[what] = work, total

    def _begin(self, watcher: Watcher) -> None:
        session = self._begun = self.session
        session.remember_texts(self.paths)
        session.prepare()
        self._open_control(watcher)
        session.emit(Ready(session.target.pid, session.target.program, tuple(str(p) for p in self.paths)))
        if self._builder is None:
            session.touched.start()
            session.warm(self.paths)

    def _open_control(self, watcher: Watcher) -> None:
        if self._control is not None:
            try:
                self._control.listen(self.session.target.pid, watcher.wake)
            except PatcherError as error:
                self.session.emit(Note(f"`patcher ctl` cannot reach this watch: {error.message}"))

    def go_on(self, session: Session, *, as_built: bool) -> None:
        """Go on with another process: of a program built of the sources as they are (`as_built`), or the same."""
        session.dependencies = self.session.dependencies
        if not as_built:
            session.texts = self.session.texts
        elif self._builder is not None:
            self._builder.outstanding()
            self._builder.take()
        self.session = session
        self.wants_restart = False
        self._left = 0
        self.edits.gone()
        self.edits.restarted(as_built=as_built)
        self._restarted = True

    def missed(self, saved: Iterable[Path]) -> None:
        """Take note of files that were saved while there was no process."""
        self.edits.saved(f for f in saved if not is_build_file(f))

    def round(self, saved: Iterable[Path], pending: Pending) -> None:
        """Handle one round of saves; `pending` tells whether more was saved meanwhile.

        Raises `TargetGone` only: without a target there is nothing to go on with.
        """
        round_ = _Round(time.perf_counter(), _since_save(saved), pending)
        self.session.emit(Saved(tuple(sorted(str(p) for p in saved))))
        self._drop_vanished()
        commands = [f for f in saved if is_build_file(f)] if self._builder is None else []
        self.edits.saved(f for f in saved if f.exists() and f not in commands)
        if commands:
            self._read_commands_anew(commands)
        self._go(round_)

    def _say_left_out(self) -> None:
        """Say once for each .gitignore that a save is left alone for it: --ignore was asked for, this was not."""
        for rule, path in self._wanted.left_out.items():
            if rule != IGNORE and rule not in self._told:
                self._told.add(rule)
                hint = "give it to --watch by name, or --no-gitignore, to have such files applied"
                self.session.emit(Note(f"{path.name}: left alone, as {rule} ignores it; {hint}"))

    def _look_at_commands(self, pending: Pending) -> None:
        """Try again what is pending, when compile commands changed that are not among what is watched."""
        stamp = self.session.units.commands.stamp()
        changed = [
            Path(path) for path, modified in stamp if modified and self._commands.get(path, modified) != modified
        ]
        self._commands = dict(stamp)
        if changed and self._builder is None:
            self._read_commands_anew(changed)
            self._go(_Round(time.perf_counter(), 0.0, pending))

    def _read_commands_anew(self, files: Collection[Path]) -> None:
        self._commands = dict(self.session.units.commands.stamp())
        self.session.emit(Note(f"{_listed(files)}: compile commands are read anew"))
        self.edits.saved(self.edits.pending())
        self.session.dependencies.forget()
        self.session.touched.start()

    def _go(self, round_: _Round) -> None:
        self._tell("building", files=sorted(map(str, self.edits.core())))
        self._given_up = False
        try:
            self._try_all(round_)
        except BuildCancelled:  # saved again while it was compiled: the next round has everything
            self.edits.cancelled()
            self._given_up = True
        except TargetGone:
            self.edits.gone()
            raise
        finally:
            self._tell("idle")
        self._commands = dict(self.session.units.commands.stamp())

    def _try_all(self, round_: _Round) -> None:
        made = self._units_of(self.edits.pending(), round_)
        everything, core = self.edits.pending(), self.edits.core()
        compiled: list[Source] | None = None
        for files in dict.fromkeys(f for f in (everything, core) if f):
            try:
                if compiled is None:
                    compiled = self._build(files, made, round_)
                    self.edits.built(files)
                if round_.pending():
                    raise BuildCancelled("the build was cancelled", "the newer save is built instead")
                wanted = compiled if files == everything else self._share(compiled, files, made)
                outcome = self._make_live(wanted, round_)
            except (BuildCancelled, TargetGone):
                raise
            except (PatcherError, FileNotFoundError) as error:
                if self._drop_vanished():
                    self._try_all(round_)
                    return
                if not isinstance(error, PatcherError):
                    raise
                blamed = _blamed(error, made, files) & core
                if files == core or blamed:
                    self._failed(error, core, blamed)
                    return
            else:
                self._went(outcome, files)
                return
        self.edits.refused(self.edits.pending())  # as before: nothing else was to be tried

    def _drop_vanished(self) -> bool:
        """Let go of what was deleted since it was saved, as by a makefile that tries a compiler; tell if any was."""
        gone = [f for f in self.edits.pending() if not f.exists()]
        self.edits.vanished(gone)
        return bool(gone)

    def _went(self, outcome: Generation, files: Collection[Path]) -> None:
        if self._left != self.session.found:
            self.edits.reverted()  # by somebody else, or changed by another of us
        self._left = outcome.number
        self.edits.applied(files)
        self.edits.refused(self.edits.pending())
        self._built.update(files)
        if self._builder is not None:
            self._builder.take()
        self.session.report(outcome, sorted(files))

    def _failed(self, error: PatcherError, core: Collection[Path], blamed: Collection[Path]) -> None:
        if isinstance(error, BuildError):
            self.edits.build_failed(core, blamed)
            self.edits.refused(f for f in self.edits.pending() if self.edits.state(f) is State.BUILT)
            named = _listed(blamed)
            hint = "" if self._built.issuperset(blamed) else error.hint
            self.session.emit(BuildFailed(error.file or named, error.diagnostics, error.message, hint))
            held = [f for f in core if self.edits.state(f) is State.HELD]
            if held:
                self.session.emit(Note(f"{_listed(held)}: goes live when that is mended"))
        else:
            self.edits.refused(self.edits.pending())
            self._refuse(error, core)
            self.wants_restart = self._restarted_if_refused and isinstance(error, _OF_THE_CHANGE)

    def _refuse(self, error: PatcherError, files: Collection[Path]) -> None:
        self.session.emit(Refused(error.code, error.message, error.hint, ", ".join(map(str, sorted(files)))))

    # --- what is asked of it ------------------------------------------------------------------------------------

    def _tell(self, name: str, **fields: object) -> None:
        if self._control is not None:
            self._control.tell(name, **fields)

    def _hold(self, saved: frozenset[Path]) -> None:
        self._held |= saved
        self._tell("held", files=sorted(map(str, saved)))

    def _obey(self, control: Control, watcher: Watcher) -> None:
        """Do some of what is asked; saves are looked at before the rest."""
        for _ in range(_ASKED_AT_ONCE):
            asked = control.take()
            if asked is None:
                return
            try:
                with control.recorded() as told:
                    outcome = self._do(asked.call, watcher, told)
            except PatcherError as error:
                asked.answer(Fault.of(error))
                if isinstance(error, TargetGone):
                    raise
            else:
                asked.answer(outcome)
        watcher.wake()

    def _do(self, call: Call, watcher: Watcher, told: Sequence[Mapping[str, object]]) -> object:
        match call.method:
            case Method.PAUSE | Method.RESUME if self.paused != (call.method is Method.PAUSE):
                self.paused = not self.paused
                self._tell("paused" if self.paused else "resumed")
        match call.method:
            case Method.PAUSE:
                return {"paused": True}
            case Method.APPLY | Method.RESUME:
                self._apply([Path(f) for f in call.parameters.get("files", ())], watcher)
                return _outcome(told, self.paused)
            case Method.REVERT:
                number = self.session.revert(call.parameters.get("generation"))
                event = Reverted(number, self.session.frames)
                self.session.emit(event)
                return event.as_json()
        return self._status()

    def _apply(self, files: Sequence[Path], watcher: Watcher) -> None:
        """Apply files, what was saved while it was paused, and what is pending."""
        for file in files:
            if not file.is_file():
                raise PatcherError(f"{file}: no such file", "give its absolute path", code="no-file")
        pending = (lambda: False) if self.paused else watcher.pending
        saved, self._held = self._held.union(f.resolve() for f in files), frozenset()
        if saved:
            self.round(saved, pending)
        elif self.edits.pending():
            self._go(_Round(time.perf_counter(), 0.0, pending))

    def _status(self) -> dict[str, object]:
        found = self.session.status()
        return {
            **found.as_json(),
            "recorded": list(found.recorded),
            "paused": self.paused,
            "watching": [str(p) for p in self.paths],
            "saved": sorted(map(str, self._held)),
            "pending": sorted(map(str, self.edits.pending() - self._held)),
        }

    # --- what is built ------------------------------------------------------------------------------------------

    def _units_of(self, files: Collection[Path], round_: _Round) -> dict[Path, frozenset[Path]]:
        """Return the units that each file makes; the files that make none are not pending any more, and it is said."""
        made = {f: frozenset([f]) for f in files}
        if self._builder is not None:
            return made
        alone = self._not_compiled_alone(files)
        others = [f for f in files if f in alone or not is_unit(f)]
        if not others:
            return made
        touched = self.session.touched.by(others, round_.pending)
        made |= {f: units for f, units in touched.items() if units or f not in alone}
        idle = [f for f in others if not made[f]]
        self.edits.vanished(idle)
        if idle and idle == list(files):
            self.session.emit(Note(f"{_listed(idle)}: nothing that the process was built from includes it"))
        units = frozenset[Path]().union(*touched.values())
        if len(units) > 1:
            named = _listed(f for f in others if touched[f])
            self.session.emit(Note(f"{named}: {len(units)} units include it"))
        self._set_strangers_aside({f: error for f, error in alone.items() if not touched[f]})
        return made

    def _not_compiled_alone(self, files: Collection[Path]) -> dict[Path, NoCompileCommand]:
        """Return the source files that nothing says how to compile: another may include them."""
        found = {}
        for file in filter(is_unit, files):
            try:
                self.session.units.commands.find(file)
            except NoCompileCommand as error:
                found[file] = error
        return found

    def _set_strangers_aside(self, unknown: Mapping[Path, NoCompileCommand]) -> None:
        """Refuse, each by itself, files that cannot be compiled and that the process has nothing of."""
        self._drop_vanished()
        for file, error in sorted(unknown.items()):
            core = self.edits.core()
            if file in core and len(core) > 1 and not self.session.touched.may_have(file):
                self.edits.refused([file])
                self._refuse(error, [file])

    def _share(
        self, compiled: Sequence[Source], files: Collection[Path], made: Mapping[Path, frozenset[Path]]
    ) -> list[Source]:
        """Return what some of the files made, of all that was built; of objects of a build, those it just wrote."""
        units = self._fresh if self._builder is not None else frozenset[Path]().union(*(made[f] for f in files))
        return [s for s in compiled if s.file in units]

    def _build(self, files: Collection[Path], made: Mapping[Path, frozenset[Path]], round_: _Round) -> list[Source]:
        session = self.session
        if self._builder is not None:
            with session.working(f"--build {self._builder.command}"):
                self._fresh = frozenset(self._builder.run(sorted(files), cancelled=round_.pending))
            return session.build(self._builder.outstanding(), cancelled=round_.pending)
        units = frozenset[Path]().union(*(made[f] for f in files))
        among = Standing.AMONG_OTHERS
        standings = {f: among for f in files if len(files) > 1 and session.texts.of(f)}
        standings = {u: Standing.TOUCHED for u in units if u not in files} | standings
        with session.touched.held():
            return session.build(sorted(units), cancelled=round_.pending, standings=standings)

    def _make_live(self, compiled: Sequence[Source], round_: _Round) -> Generation:
        """Make what was built live, once another patcher that is at work there is done."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                return self.session.make_live(compiled, started=round_.began, began=round_.began, detect=round_.detect)
            except TargetBusy as error:
                if error.code != "locked" or time.monotonic() > deadline or round_.pending():
                    raise
                time.sleep(_BUSY_POLL_SECONDS)


class _Round:
    """When a round began (perf_counter), how many ms after the save, and whether more was saved since."""

    def __init__(self, began: float, detect: float, pending: Pending) -> None:
        self.began = began
        self.detect = detect
        self.pending = pending


def _outcome(told: Sequence[Mapping[str, object]], paused: bool) -> object:
    """Return what came of a round, of what was told of it: a Fault, where it is not live."""
    for event in told:
        if event["event"] == "refused":
            data = {"reason": event["reason"], "hint": event["hint"], "events": list(told)}
            return Fault(FAILED, str(event["message"]), data)
        if event["event"] == "build_failed":
            data = {"reason": "build-failed", "hint": "", "events": list(told)}
            return Fault(FAILED, f"{event['file']} does not compile", data)
    return {"paused": paused, "events": list(told)}


def _blamed(error: PatcherError, made: Mapping[Path, frozenset[Path]], files: Collection[Path]) -> frozenset[Path]:
    """Return the files that a failed build is about: all, where it does not tell."""
    if not isinstance(error, BuildError):
        return frozenset()
    failed = frozenset(map(Path, error.files))
    return frozenset(f for f in files if f in failed or made.get(f, frozenset()) & failed) or frozenset(files)


def _listed(files: Iterable[Path]) -> str:
    names = sorted(f.name for f in files)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _since_save(files: Iterable[Path]) -> float:
    """Return the milliseconds since the last of some files was written."""
    written = 0.0
    for file in files:
        try:
            stat = file.stat()
        except OSError:
            continue
        # A rename keeps the time of writing, but changes the inode.
        written = max(written, stat.st_mtime, min(stat.st_ctime, time.time()))
    return max(0.0, (time.time() - written) * 1e3) if written else 0.0
