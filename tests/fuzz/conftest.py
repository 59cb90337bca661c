"""The good objects and their programs, compiled once."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz.corpus import build


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "corpus"
    build(folder)
    return folder
