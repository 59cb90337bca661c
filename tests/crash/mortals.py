"""For each line of JSON: patch in a child that somebody meddles with, and say how it ended.

Forked from a small process, which has everything loaded but drgn and has no threads, the children start quickly.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import patcher.activity
import patcher.data
import patcher.loader
import patcher.match
import patcher.relink
import patcher.session
import patcher.target.pages
import patcher.units
from patcher.errors import PatcherError
from patcher.patch.reclaim import Policy

GETSID = 124
BPF_LOAD, BPF_EQUAL, BPF_RETURN, ALLOW, TRACE = 0x20, 0x15, 0x06, 0x7FFF0000, 0x7FF00000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 38, 22
EXPECTED = 1  # exit status for an error of ours; 130 when it was interrupted, 70 for any other exception


def show(calls: set[int]) -> None:
    """Have whoever traces us see these system calls, and no others (seccomp(2), SECCOMP_RET_TRACE)."""
    tests = [struct.pack("<HBBI", BPF_EQUAL, len(calls) - i, 0, call) for i, call in enumerate(sorted(calls))]
    ends = [struct.pack("<HBBI", BPF_RETURN, 0, 0, kind) for kind in (ALLOW, TRACE)]
    code = b"".join([struct.pack("<HBBI", BPF_LOAD, 0, 0, 0), *tests, *ends])
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, 2, program) == 0


def work(
    pid: int, files: list[str], generation: int | None, options: dict[str, Any], policy: dict[str, Any] | None
) -> None:
    with patcher.attach(pid, **options) as session:
        if policy:
            session.policy = Policy(**policy)
        if files:
            session.apply(*files)
        else:
            session.revert(generation)


def live(order: dict[str, Any]) -> int:
    for name, limit in order.get("limits", {}).items():
        if limit < 0:  # so many MiB more than there are by now
            used = int(re.search(r"VmSize:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10
            limit = used + (-limit << 20)
        resource.setrlimit(getattr(resource, name), (limit, limit))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if order["meddler"] and order["meddler"][1] not in ("stop", "interrupt"):
        show({*map(int, order["meddler"][3].split(",")), GETSID})
    os.getsid(0)
    try:
        work(order["pid"], order["files"], order["generation"], order["options"], order["policy"])
    except PatcherError as error:
        os.getsid(0)
        print(json.dumps({"code": error.code, "message": error.message, "hint": error.hint}))
        return error.exit_status
    except KeyboardInterrupt:
        os.getsid(0)
        print("{}")
        return 130
    except BaseException:
        os.getsid(0)
        print(json.dumps({"traceback": traceback.format_exc()}))
        return 70
    os.getsid(0)
    print("{}")
    return 0


@contextmanager
def meddling(words: list[str], child: int) -> Iterator[Any]:
    """Have somebody meddle with a process, if that is wanted; yields what tells the call that was met."""
    if not words:
        yield None
        return
    command = [words[0], str(child), *words[1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as meddler:
        assert meddler.stdout is not None
        assert meddler.stdout.readline() == "ready\n"
        yield meddler.stdout


def bear(order: dict[str, Any]) -> dict[str, Any]:
    go, begin = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(begin)
        os.dup2(tell, 1)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        os.read(go, 1)
        status = live(order)
        sys.stdout.flush()
        os._exit(status)
    os.close(go)
    os.close(tell)
    met = -1
    with meddling(order["meddler"], child) as meddler, os.fdopen(told) as said:
        os.write(begin, b"g")
        os.close(begin)
        if meddler is not None:
            met = int(meddler.readline())
        if met >= 0 and order["meddler"][1] == "stop":
            os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            print(json.dumps({"stopped": child, "met": met}), flush=True)
            sys.stdin.readline()
            os.kill(child, 18)
        text = said.read()
    _, status = os.waitpid(child, 0)
    return {
        "met": met,
        "code": os.waitstatus_to_exitcode(status),
        "said": json.loads(text) if text else None,
    }


for line in sys.stdin:
    print(json.dumps(bear(json.loads(line))), flush=True)
