"""What every error has in common."""

from __future__ import annotations

from patcher.errors import PatcherError


def test_messages_have_no_control_characters() -> None:
    error = PatcherError("`a\x1b[31mb\x07\udcff\x9b`\nis nöwhere", "see \x1b]0;")
    assert error.message == str(error) == "`a\\x1b[31mb\\x07\\udcff\\x9b`\nis nöwhere"
    assert error.hint == "see \\x1b]0;"
