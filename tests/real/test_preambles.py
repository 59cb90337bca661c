"""Every unit of lua, compiled behind its preamble: the objects are those of the plain compile."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from build.test_preamble import assert_same, command_of

from patcher.build.preamble import Preambles
from patcher.build.preamble.text import cut

from .sources import SourcesUnavailable, cache_directory, fetch

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_objects_of_lua_are_the_same(cc: str, tmp_path: Path) -> None:
    try:
        sources = fetch("lua5.4", cache_directory()) / "src"
    except SourcesUnavailable as error:
        if os.environ.get("PATCHER_REAL_OFFLINE") == "skip" and not os.environ.get("CI"):
            pytest.skip(str(error))
        raise
    store = Preambles(tmp_path / "preambles", dict(os.environ))
    compared: Counter[bool] = Counter()
    try:
        for source in sorted(sources.glob("*.c")):
            divided = cut(source.read_bytes()) is not None
            compared[divided] += 1
            if divided:
                words = (cc, "-std=gnu99", "-O2", "-g", "-w", "-DLUA_USE_LINUX", "-DLUA_COMPAT_5_3")
                assert_same(command_of(sources, *words, file=source.name), store)
    finally:
        store.close()
    assert compared[True] >= 30
