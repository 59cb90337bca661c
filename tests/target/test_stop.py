"""Stopping real programs, and what they notice of it: nothing."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from project import statuses

import patcher.target.stop as stop
from patcher.errors import AttachDenied, PatcherError, TargetBusy, TargetGone
from patcher.target import Target
from patcher.target.tracing import thread_state

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.sigqueue.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)


def assert_untraced(pid):
    assert statuses(pid, "TracerPid") == {"0"}
    assert not statuses(pid, "State") & {"t", "T"}


@pytest.mark.parametrize(("count", "stops"), [("1", 50), ("50", 25)])
def test_all_threads_stand_still_while_they_come_and_go(start, attach, count, stops):
    program = start("crowd", count, "churn")
    target = attach(program.pid)
    for _ in range(stops):
        with target.stopped() as stopped:
            assert {thread.tid for thread in stopped.threads} <= set(target.threads())
            assert statuses(program.pid, "State") <= {"t", "Z", "X"}
            assert program.pid in {thread.tid for thread in stopped.threads}
        assert stopped.duration_ns > 0
    assert_untraced(program.pid)
    before = int(program.ask("more"))
    assert int(program.ask("end")) >= before > int(count)
    assert program.process.wait(10) == 7


def test_calls_that_a_stop_interrupts_go_on(start, attach):
    program = start("blockers")
    target = attach(program.pid)
    for _ in range(300):
        with target.stopped():
            pass
    assert_untraced(program.pid)
    assert program.ask("report") == ""
    while int(program.ask("naps").split()[0]) < 3:
        with target.stopped():
            pass
    _, short, long = map(int, program.ask("naps").split())
    assert (short, long) == (0, 0)
    assert program.finish() == 0


def test_without_the_table_the_program_would_notice(start, attach, monkeypatch):
    monkeypatch.setattr(stop, "REPORTS_EINTR", frozenset())
    program = start("blockers")
    target = attach(program.pid)
    missing = {"epoll_wait", "accept", "sigtimedwait", "recv", "semop"}
    deadline = time.monotonic() + 20
    while missing:  # a thread may be kept from sleeping again for long
        assert time.monotonic() < deadline, f"unnoticed: {missing}"
        with target.stopped():
            pass
        report = program.ask("report")
        missing = {name for name in missing if name not in report}


def test_a_signal_sent_while_all_stand_still_is_delivered_afterwards(start, attach):
    program = start("signals")
    target = attach(program.pid)
    with target.stopped():
        LIBC.sigqueue(program.pid, signal.SIGRTMIN, 5)
    assert program.ask("report") == "1 0 1"


@pytest.mark.parametrize("threads", [(), ("spinning",)])
def test_signals_during_stops_arrive_once_each(start, attach, threads):
    program = start("signals", *threads)
    target = attach(program.pid)
    sent = 600
    sender = threading.Thread(
        target=lambda: [LIBC.sigqueue(program.pid, signal.SIGRTMIN, value) for value in range(sent)]
    )
    sender.start()
    stops = 0
    while sender.is_alive() or stops < 100:
        with target.stopped():
            pass
        stops += 1
    sender.join()
    assert program.ask("report") == f"{sent} 0 {sent}"


def test_a_stopped_job_stays_stopped(start, attach):
    program = start("signals", "spinning")
    target = attach(program.pid)
    os.kill(program.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(program.pid, os.WUNTRACED)[1])
    for _ in range(20):
        with target.stopped():
            pass
    while statuses(program.pid, "State") != {"T"}:
        time.sleep(0.001)
    assert os.waitpid(program.pid, os.WUNTRACED | os.WNOHANG) == (0, 0)
    os.kill(program.pid, signal.SIGCONT)
    assert program.ask("report") == "0 0 0"
    assert_untraced(program.pid)


def test_threads_are_let_go_after_an_exception(start, attach):
    program = start("signals", "spinning")
    target = attach(program.pid)
    with pytest.raises(ZeroDivisionError), target.stopped():
        raise ZeroDivisionError
    assert_untraced(program.pid)
    assert program.ask("report") == "0 0 0"


def test_keyboard_interrupt_waits_for_the_end_of_the_stop(start, attach):
    program = start("signals", "spinning")
    target = attach(program.pid)
    reached = []

    def interrupted():
        with target.stopped():
            os.kill(os.getpid(), signal.SIGINT)
            taker = threading.Thread(target=signal.pthread_sigmask, args=(signal.SIG_UNBLOCK, {signal.SIGINT}))
            taker.start()
            taker.join()
            reached.append(statuses(program.pid, "State"))

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == [{"t"}]
    assert_untraced(program.pid)


def test_stepping_moves_one_thread_by_one_instruction(start, attach):
    program = start("vectors")
    target = attach(program.pid)
    with target.stopped() as stopped:
        seen = {stopped.threads[0].pc}
        for _ in range(20):
            seen.add(stopped.step(program.pid).pc)
        assert stopped.threads[0].pc in seen
    assert len(seen) > 2
    assert program.ask("report").split()[1] == "0"


def test_stepping_a_blocked_thread_leaves_it_where_it_is(start, attach):
    program = start("signals", "spinning")
    while not Path(f"/proc/{program.pid}/syscall").read_text().startswith("0 "):
        pass  # it has greeted us, and is on its way into read(2)
    target = attach(program.pid)
    with target.stopped() as stopped:
        before = next(thread for thread in stopped.threads if thread.tid == program.pid)
        assert stopped.step(program.pid) == before
        with pytest.raises(PatcherError, match="not one of the stopped"):
            stopped.step(1)
    assert program.ask("report") == "0 0 0"


def test_stepping_into_a_call_that_blocks_does_not_hang(start, attach):
    program = start("bare")
    target = attach(program.pid)
    with target.stopped() as stopped:
        pc = stopped.threads[0].pc
    program.process.stdin.write("x\n")
    program.process.stdin.flush()
    assert program.line() == "x"
    # Blocked in read again, at the same place; let it take a line and step to its next read.
    os.kill(program.pid, signal.SIGSTOP)
    os.waitpid(program.pid, os.WUNTRACED)
    program.process.stdin.write("y\n")
    program.process.stdin.flush()
    os.kill(program.pid, signal.SIGCONT)
    with target.stopped() as stopped:
        for _ in range(40):
            last = stopped.step(program.pid, seconds=0.02)
    assert last.pc > 0
    assert pc > 0
    assert program.line() == "y"
    assert program.finish() == 0


def test_one_thread_sampled(start, attach):
    program = start("signals", "spinning")
    target = attach(program.pid)
    other = next(tid for tid in target.threads() if tid != program.pid)
    while thread_state(program.pid, program.pid) != "S":  # on its way from "ready" to its next line
        time.sleep(0.001)
    with target.sampled(other) as thread:
        assert thread.tid == other
        assert statuses(program.pid, "State") == {"S", "t"}
    pc, sp = target.thread_registers(other)
    assert any(pc in mapping and mapping.executable for mapping in target.mappings())
    assert any(sp in mapping and mapping.writable for mapping in target.mappings())
    with pytest.raises(TargetGone):
        target.thread_registers(2**22 - 1)


def test_end_of_the_program_while_it_is_stopped_is_remembered(start, attach):
    program = start("signals", "spinning")
    target = attach(program.pid)
    with target.stopped():
        os.kill(program.pid, signal.SIGKILL)
    deadline = time.monotonic() + 5
    while target.alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    with pytest.raises(TargetGone), target.stopped():
        pass
    if target.exit_status is not None:
        assert os.WTERMSIG(target.exit_status) == signal.SIGKILL


def test_a_leader_that_has_ended_is_no_obstacle(tmp_path, attach):
    source = tmp_path / "leaderless.c"
    source.write_text(
        "#include <pthread.h>\n#include <stdio.h>\n#include <unistd.h>\n"
        'static void *rest(void *a) { pthread_join(*(pthread_t *)a, 0); char c; puts("ready"); fflush(stdout);\n'
        "  while (read(0, &c, 1) > 0) {} _exit(4); }\n"
        "int main(void) { static pthread_t self; pthread_t t; self = pthread_self();\n"
        "  pthread_create(&t, 0, rest, &self); pthread_exit(0); }\n"
    )
    binary = tmp_path / "leaderless"
    subprocess.run(["gcc", "-o", binary, source, "-pthread"], check=True)
    with subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while "Z" not in statuses(process.pid, "State"):
            time.sleep(0.001)
        with pytest.raises(AttachDenied, match=r"main thread of process .* has ended"):
            attach(process.pid)
        with stop.stopped_process(process.pid, stop.Lingering()) as stopped:
            assert process.pid not in {thread.tid for thread in stopped.threads}
            assert len(stopped.threads) == 1
        process.stdin.close()
        assert process.wait(10) == 4


def test_uninterruptible_thread_is_named(tmp_path, attach):
    source = tmp_path / "vforking.c"
    source.write_text(
        "#include <stdio.h>\n#include <unistd.h>\n"
        'int main(void) { char c; puts("ready"); fflush(stdout);\n'
        "  if (vfork() == 0) { while (read(0, &c, 1) > 0) {} _exit(0); } return 5; }\n"
    )
    binary = tmp_path / "vforking"
    subprocess.run(["gcc", "-w", "-o", binary, source], check=True)
    with subprocess.Popen([binary], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        while statuses(process.pid, "State") != {"D"}:
            time.sleep(0.001)
        with (
            Target.attach(process.pid) as target,
            pytest.raises(TargetBusy, match=f"thread {process.pid} .* state D"),
            stop.stopped_process(process.pid, stop.Lingering(), 0.2),
        ):
            pass
        assert target.pid == process.pid
        assert statuses(process.pid, "TracerPid") == {"0"}
        process.stdin.close()
        assert process.wait(10) == 5


def test_we_run_as_before_when_many_threads_have_been_stopped(start, attach):
    """We are ahead of whom we wake as long as we wake them, and no longer: what waits for them must let them run."""
    target = attach(start("crowd", "20").pid)
    before, asked = (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority), []
    interrupt, detach = stop.Tracee.interrupt, stop.Tracee.detach

    class Watched(stop.Tracee):
        def interrupt(self):
            asked.append(os.sched_getscheduler(0))
            interrupt(self)

        def detach(self):
            asked.append(os.sched_getscheduler(0))
            return detach(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stop, "Tracee", Watched)
        with target.stopped() as stopped:
            assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
            assert len(stopped.counters()) == len(stopped.pointers()) == len(stopped.threads)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
    assert len(asked) >= 40
    assert len(set(asked)) == 1
