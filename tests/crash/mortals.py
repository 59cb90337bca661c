"""For each line of JSON: patch in a child that somebody meddles with, and say how it ended.

Forked from a small process, which has everything loaded but drgn and has no threads, the children start quickly.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import patcher.activity
import patcher.data
import patcher.loader
import patcher.match
import patcher.relink
import patcher.session
import patcher.units
from patcher.errors import PatcherError

EXPECTED = 1  # exit status for an error of ours; 130 when it was interrupted, 70 for any other exception


def work(pid: int, files: list[str], generation: int | None, options: dict[str, Any]) -> None:
    with patcher.attach(pid, **options) as session:
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
    os.getsid(0)
    try:
        work(order["pid"], order["files"], order["generation"], order["options"])
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
    command = [*order["meddler"][:1], str(child), *order["meddler"][1:]]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as meddler, os.fdopen(told) as said:
        assert meddler.stdout is not None
        assert meddler.stdout.readline() == "ready\n"
        os.write(begin, b"g")
        os.close(begin)
        count, met = map(int, meddler.stdout.readline().split())
        if order["meddler"][1] == "stop" and met >= 0:
            os.waitid(os.P_PID, child, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            print(json.dumps({"stopped": child, "met": met}), flush=True)
            sys.stdin.readline()
            os.kill(child, 18)
        text = said.read()
    _, status = os.waitpid(child, 0)
    return {
        "count": count,
        "met": met,
        "code": os.waitstatus_to_exitcode(status),
        "said": json.loads(text) if text else None,
    }


for line in sys.stdin:
    print(json.dumps(bear(json.loads(line))), flush=True)
