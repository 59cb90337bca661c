"""What stands in the way of changing a program here, and what to do about each: the machine, and a program's file.

Nothing but a process of its own is touched, and that only to try what would be done to a target.
"""

from patcher.doctor.finding import Finding, State
from patcher.doctor.machine import examine_machine
from patcher.doctor.program import Examination, examine_program

__all__ = ["Examination", "Finding", "State", "examine_machine", "examine_program"]
