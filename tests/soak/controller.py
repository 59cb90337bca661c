"""A controller that changes one process as it is told, and that may be killed at any moment.

    python controller.py PID COMPILE_COMMANDS

An order is a line of JSON, as is the answer: `{"apply": [files]}`, `{"revert": generation}` or `{}`, which only asks
how things stand.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import patcher


def obey(session: patcher.Session, order: dict[str, Any]) -> dict[str, Any]:
    """Do what was ordered; return what became of it."""
    done: dict[str, Any] = {}
    if "apply" in order:
        outcome = session.apply(*order["apply"])
        done = {"stop": outcome.timings.stop, "functions": [f.name for f in outcome.functions]}
    elif "revert" in order:
        session.revert(order["revert"])
    status = session.status()
    arenas = sum(a.used for a in status.arenas)
    where = {f.name: f.current for f in status.functions}
    return {**done, "generation": status.generation, "recorded": status.recorded, "used": arenas, "where": where}


def main() -> None:
    # A change may be of nearly all functions of a unit, which looks as if it were not the program's.
    with patcher.attach(int(sys.argv[1]), compile_commands=sys.argv[2], force=True) as session:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            try:
                answer = obey(session, json.loads(line))
            except patcher.PatcherError as error:
                answer = {"refused": error.code, "message": error.message, "generation": session.status().generation}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
