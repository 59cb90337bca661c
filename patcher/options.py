"""What a user may choose for a session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from patcher.errors import PatcherError

CHOICES = {"active": ("run-on", "drain", "refuse"), "consistency": ("function", "generation")}


@dataclass(frozen=True, slots=True)
class Options:
    """The choices; each has the default that suits most."""

    compile_commands: Path | None = None
    watched: tuple[Path, ...] = ()
    build: str = ""
    force: bool = False
    every_function: bool = False  # replace functions that did not change as well
    dry_run: bool = False
    best_effort: bool = False  # of several processes, change those that can be
    colour: bool = False
    allowed_layouts: tuple[str, ...] = ()  # types whose layout may change, on the user's responsibility
    archives: tuple[Path, ...] = ()  # where to look for what is missing
    libraries: tuple[str, ...] = ()  # likewise; loaded into the process when they have it
    reinit: tuple[str, ...] = ()  # variables that get their new initial value, if that changed
    allow_undefined: bool = False  # calls of functions that are nowhere abort when they are reached
    hook_timeout: float = 5.0  # seconds that each function which the program has for us to call may take
    keep: int = 50  # how many generations stay recorded at least, for revert
    active: str = "run-on"  # what becomes of who is in old code: "run-on", "drain" or "refuse"
    consistency: str = "function"  # "generation": changed functions change while nobody is in any of them
    coroutines: bool = True  # stacks that no thread is on count as well
    timeout: float = 5.0  # seconds to wait until nobody is in old code

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise PatcherError(f"{name}: {getattr(self, name)!r} is none of {', '.join(known)}")
