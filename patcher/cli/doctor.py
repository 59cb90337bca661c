"""`patcher doctor`: what stands in the way, here and in a program, and what to do about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from patcher.cli.options import gather, takes

if TYPE_CHECKING:
    from patcher.doctor import Examination, Finding


@click.command()
@click.argument("program", required=False)
@takes("doctor")
def doctor(program: str | None, **rest: Any) -> int:
    """Look at this machine, and at PROGRAM, and say what to do where something stands in the way.

    \b
    patcher doctor                        may processes be traced and written to here
    patcher doctor ./prog                 and can this program be changed: symbols, commands, functions
    patcher doctor ./prog --json          every unit and function

    The exit status is 1 when nothing could be changed as it is.
    """
    from patcher.doctor import State, examine_machine, examine_program  # numpy, which starts threads

    asked = gather("doctor", rest)
    machine = examine_machine()
    found = None
    if program is not None:
        found = examine_program(
            program, compile_commands=asked.compile_commands, watched=asked.watched, build=asked.build
        )
    hopeless = any(f.state is State.BAD for f in machine) or (found is not None and found.hopeless)
    if asked.json:
        click.echo(json.dumps(_as_json(machine, found, not hopeless)))
        return int(hopeless)
    _print("machine", machine)
    if found is not None:
        _print(f"program {found.program}", found.findings)
    return int(hopeless)


def _print(subject: str, findings: Sequence[Finding]) -> None:
    click.echo(subject)
    for one in findings:
        click.echo(f"  {one.state.value:5} {one.topic}: {one.message}")
        if one.hint:
            click.echo(f"          {one.hint}")


def _as_json(machine: Sequence[Finding], found: Examination | None, ok: bool) -> dict[str, object]:
    told: dict[str, object] = {"ok": ok, "machine": [_finding(f) for f in machine]}
    if found is not None:
        told["program"] = found.program
        told["findings"] = [_finding(f) for f in found.findings]
        told["units"] = [asdict(unit) for unit in found.units]
    return told


def _finding(finding: Finding) -> dict[str, str]:
    return {**asdict(finding), "state": finding.state.value}
