"""Fixtures of the real runs; nothing here is collected unless asked for: `pytest tests/real -m real`."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from .sources import SourcesUnavailable, cache_directory
from .trees import LUA, LUA_WITH_TESTS, MEMCACHED, NGINX, REDIS, Recipe, Tree, built, restored


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    asked_for = "real" in str(config.option.markexpr).replace("not real", "")
    return None if asked_for or collection_path.suffix != ".py" else True


@pytest.fixture(scope="session", autouse=True)
def alone() -> Iterator[None]:
    """Wait until no other run edits the trees in the cache."""
    cache_directory().mkdir(parents=True, exist_ok=True)
    with (cache_directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def built_tree(recipe: Recipe) -> Tree:
    """Return a built tree; fails where its sources cannot be had, or skips if that was asked for."""
    for tool in ("cc", "make", "patch"):
        if shutil.which(tool) is None:
            pytest.fail(f"{tool} is not installed")
    try:
        return built(recipe, cache_directory())
    except SourcesUnavailable as error:
        message = f"the source package {recipe.package} could not be fetched (is there a network?)\n{error}"
    # A run that tests nothing must not look like one that passed: skipping has to be asked for.
    if os.environ.get("PATCHER_REAL_OFFLINE") == "skip" and not os.environ.get("CI"):
        pytest.skip(message)
    pytest.fail(f"{message}\nPATCHER_REAL_OFFLINE=skip skips these tests instead.", pytrace=False)


@pytest.fixture(scope="module")
def redis_tree() -> Tree:
    return restored(built_tree(REDIS))


@pytest.fixture(scope="module")
def lua_tree() -> Tree:
    return restored(built_tree(LUA))


@pytest.fixture(scope="module")
def lua_with_tests_tree() -> Tree:
    return restored(built_tree(LUA_WITH_TESTS))


@pytest.fixture(scope="module")
def nginx_tree() -> Tree:
    return restored(built_tree(NGINX))


@pytest.fixture(scope="module")
def memcached_tree() -> Tree:
    return restored(built_tree(MEMCACHED))
