"""The target: the only room that touches the live process, its threads, memory and mappings."""

from patcher.target.jobcontrol import JobControl, exit_code, wait_exit
from patcher.target.maps import Mapping, processes_mapping, processes_named
from patcher.target.memory import Memory, WriteRefused
from patcher.target.process import has_trace_capability, read_parent, read_stat, read_status, yama_scope
from patcher.target.spawn import NoSuchProgram, SpawnedProcess, spawn
from patcher.target.steps import FunctionCall, Result, Step, SystemCall
from patcher.target.stop import Stopped, StoppedThread
from patcher.target.target import Target

__all__ = [
    "FunctionCall",
    "JobControl",
    "Mapping",
    "Memory",
    "NoSuchProgram",
    "Result",
    "SpawnedProcess",
    "Step",
    "Stopped",
    "StoppedThread",
    "SystemCall",
    "Target",
    "WriteRefused",
    "exit_code",
    "has_trace_capability",
    "processes_mapping",
    "processes_named",
    "read_parent",
    "read_stat",
    "read_status",
    "spawn",
    "wait_exit",
    "yama_scope",
]
