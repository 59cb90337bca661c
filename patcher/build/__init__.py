"""Which units a saved file touches, the command that compiles a unit, and running it.

`Commands` finds commands, `Compiler` makes objects of our own with them, `BuildCommand` runs the user's own build.
Nothing here looks at the target process; ELF files are read by path, for their debug information only.
"""

from patcher.build.build_command import BuildCommand
from patcher.build.command import LINE_SHIFT, CompileCommand, Variant, is_header, is_unit, object_of
from patcher.build.commands import Commands
from patcher.build.compiler import CompiledUnit, Compiler
from patcher.build.debuginfo import DebugInformation, Recorded
from patcher.build.dependencies import Dependencies
from patcher.build.gathering import Gathering
from patcher.build.likely import likely_units
from patcher.build.linking import LinkLine, find_link_line, locate_library
from patcher.build.probe import PREFIX as PROBED
from patcher.build.probe import Probes
from patcher.build.running import BuildCancelled
from patcher.build.toolchain import Family, identify, program_index
from patcher.build.workplace import kept_directory

PLAIN = Variant.PLAIN
SHIFTED = Variant.SHIFTED
INDIRECT = Variant.INDIRECT
LARGE = Variant.LARGE
ASKING = Variant.ASKING

__all__ = [
    "ASKING",
    "INDIRECT",
    "LARGE",
    "LINE_SHIFT",
    "PLAIN",
    "PROBED",
    "SHIFTED",
    "BuildCancelled",
    "BuildCommand",
    "Commands",
    "CompileCommand",
    "CompiledUnit",
    "Compiler",
    "DebugInformation",
    "Dependencies",
    "Family",
    "Gathering",
    "LinkLine",
    "Probes",
    "Recorded",
    "Variant",
    "find_link_line",
    "identify",
    "is_header",
    "is_unit",
    "kept_directory",
    "likely_units",
    "locate_library",
    "object_of",
    "program_index",
]
