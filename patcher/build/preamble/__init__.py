"""Precompiled preambles: what stands before a unit's first declaration is compiled once, and not at each save.

`text` divides a source, `command` rewrites its compile command, `making` makes a preamble and proves it equal, with
`objects`; `inputs` tells when it no longer holds, and `preambles` keeps those of a session.
"""

from patcher.build.preamble.preambles import Preambles, Ready

__all__ = ["Preambles", "Ready"]
