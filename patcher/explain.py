"""EXPLAIN: what a save would do to a process, function by function and variable by variable, and whether it may.

A dry run that goes on where the real one stops: what is refused is explained as far as it was understood. Nothing is
decided here, and nothing written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from patcher.data.initial import Changed
from patcher.data.outcome import Fate
from patcher.errors import PatcherError, TargetError
from patcher.match import Status
from patcher.part import Part
from patcher.relink import Linked
from patcher.report import Explanation, FunctionOutlook, OldFrame, Outlook, Refusal, TypeOutlook, told_of
from patcher.units import Changes, Source, Units

_TOLD = (Status.CHANGED, Status.ADDED, Status.LINE_ONLY)


Standing = tuple[tuple[OldFrame, ...], PatcherError | None]
WithData = Callable[[Changes], tuple[Changes, tuple[Changed, ...]]]


def explain(
    units: Units,
    sources: Sequence[Source],
    with_data: WithData,
    link: Callable[[Changes], Linked],
    standing: Callable[[Linked], Standing],
) -> Explanation:
    """Explain what some sources would change; `link` links changes without any effect on the process.

    `with_data` says what becomes of data where there is no new code; `standing` who is now in the code that changes,
    and why the change may not be made then, if so.
    """
    files = tuple(dict.fromkeys(str(s.file) for s in sources))
    found = Explanation(Outlook.UNCHANGED, files)
    try:
        changes = units.matched(sources)
        found = replace(found, functions=_functions((*changes.parts, *changes.idle)))
        units.agreement.check(changes.parts, changes.idle)
        changes, kept = with_data(changes)
        if not changes.parts:
            return replace(found, variables=told_of([c.datum(Fate.KEPT) for c in kept]))
        linked = link(changes)
    except TargetError:
        raise
    except PatcherError as error:
        found = replace(found, types=_types(units, files))
        return replace(found, outlook=Outlook.REFUSED, refusal=Refusal(error.code, error.message, error.hint))
    if not linked.commit.does_nothing:
        found = replace(found, outlook=Outlook.LIVE)
    supplied, _ = units.supplies.outcome(linked)
    frames, objection = standing(linked)
    if objection is not None:
        refusal = Refusal(objection.code, objection.message, objection.hint)
        found = replace(found, outlook=Outlook.REFUSED, refusal=refusal)
    return replace(
        found,
        frames=frames,
        variables=told_of(linked.data),
        kept=linked.used,
        types=_types(units, files),
        supplied=supplied,
    )


def _types(units: Units, files: Sequence[str]) -> tuple[TypeOutlook, ...]:
    where = ", ".join(files)
    return tuple(
        TypeOutlook(v.type, where, "; ".join(v.details), f"{'accepted' if v.accepted else 'refused'}: {v.reason}")
        for v in units.agreement.verdicts
    )


def _functions(parts: Sequence[Part]) -> tuple[FunctionOutlook, ...]:
    return tuple(
        FunctionOutlook(f.name, part.source, f.status.value, f.reason)
        for part in parts
        for f in part.delta.with_status(*_TOLD)
    )
