"""Making a precompiled preamble, in the background, and proving that objects made with it are the same.

Decides whether a unit gets one: the text as it is now is compiled both ways, and the objects must be equal in all but
what debug information says.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from patcher.build.background import Background
from patcher.build.preamble.command import Rewriting
from patcher.build.preamble.inputs import Inputs, files_of, inputs_of, searched_directories, stamp_of
from patcher.build.preamble.objects import same_but_debug
from patcher.build.preamble.text import Cut, cut, leaves_state

_TICK_NS = 10_000_000  # stamps of files are as coarse as the kernel's clock tick: 10 ms at most
_WORTH = 0.9  # of the plain compile's processor time, at most


@dataclass(frozen=True, slots=True)
class Made:
    """A preamble that was precompiled from `inputs`, and the object of the text that it was proven with."""

    rewriting: Rewriting
    header: Path
    preamble: bytes
    inputs: Inputs
    worth: bool  # compiling with it takes less time
    size: int
    proven_with: Cut
    object: Path


@dataclass(frozen=True, slots=True)
class NotMade:
    """Why there is none; `lasting`: until the preamble or the command changes. `again`: it was saved meanwhile."""

    reason: str
    lasting: bool
    again: bool = False


def make(rewriting: Rewriting, place: Path, background: Background, environment: dict[str, str]) -> Made | NotMade:
    """Precompile the preamble of a unit's file as it is now into a directory, and prove it. Raises OSError."""
    command = rewriting.command
    read = stamp_of(command.file)
    divided = cut(command.file.read_bytes())
    if divided is None:
        return NotMade("it has no preamble that could be compiled by itself", lasting=True)
    header = place / "preamble.h"
    header.write_bytes(rewriting.header_text(divided))
    inputs = _precompiled(rewriting, header, background, environment)
    if isinstance(inputs, NotMade):
        return inputs
    made = _compared(rewriting, divided, header, inputs, background, environment)
    if stamp_of(command.file) != read or not inputs.unchanged():  # the objects may be those of two texts
        return NotMade("it changed meanwhile", lasting=False, again=True)
    return made


def _precompiled(
    rewriting: Rewriting, header: Path, background: Background, environment: dict[str, str]
) -> Inputs | NotMade:
    directory, output = rewriting.command.directory, header.parent / "output"
    time.sleep(2 * _TICK_NS / 1e9)  # what was written a moment ago must not look as if it were written from now on
    began = time.time_ns() - _TICK_NS
    rule, text = header.parent / "rule", header.parent / "preprocessed"
    said_plainly = {**environment, "LC_ALL": "C"}  # the words looked for are translated otherwise
    if background.run(rewriting.preprocessing(header, text), directory, output, said_plainly) is None:
        return NotMade("its preamble cannot be preprocessed by itself", lasting=False)
    searched = searched_directories(output.read_text(errors="replace"), directory)
    state = leaves_state(text.read_bytes())
    text.unlink()
    if state:
        return NotMade(f"its preamble leaves a pragma in effect: {state}", lasting=False)
    arguments = rewriting.precompiling(header, rewriting.precompiled(header), rule)
    if background.run(arguments, directory, output, environment) is None:
        return NotMade("its preamble cannot be compiled by itself", lasting=False)
    own_directory = os.path.realpath(directory / os.path.dirname(rewriting.named))
    files = files_of(os.fsdecode(rule.read_bytes()), directory)
    found = inputs_of(files, searched, own_directory, before=began)
    return NotMade(found, lasting=False) if isinstance(found, str) else found


def _compared(
    rewriting: Rewriting,
    divided: Cut,
    header: Path,
    inputs: Inputs,
    background: Background,
    environment: dict[str, str],
) -> Made | NotMade:
    """Compile the file both ways. gcc, which cannot use what it precompiled, must not take the header instead."""
    if rewriting.precompiled(header).suffix == ".gch":
        header.unlink()
    place, directory = header.parent, rewriting.command.directory
    plain, quick, output = place / "plain.o", place / "quick.o", place / "output"
    slow = background.run(rewriting.plainly(plain), directory, output, environment)
    if slow is None:
        return NotMade("it does not compile", lasting=False)
    text = place / "text" / rewriting.command.file.name
    arguments = rewriting.behind(header, text, divided, quick)
    fast = background.run(arguments, directory, output, environment)
    if fast is None:
        return NotMade("it cannot be compiled behind its preamble", lasting=True)
    if not same_but_debug(plain.read_bytes(), quick.read_bytes()):
        return NotMade("its object is another when its preamble is compiled before", lasting=True)
    quick.unlink()
    size = rewriting.precompiled(header).stat().st_size
    return Made(rewriting, header, divided.preamble, inputs, fast < _WORTH * slow, size, divided, plain)
