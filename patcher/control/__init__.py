"""The control socket of a watch: what editors, scripts and a second terminal ask of it."""

from patcher.control.client import Connection, result_of
from patcher.control.protocol import FAILED, Call, Fault, Method
from patcher.control.server import Asked, Control

__all__ = ["FAILED", "Asked", "Call", "Connection", "Control", "Fault", "Method", "result_of"]
