"""--watch from the save to the answer, where one save touches many files, or several watches see it."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path

from project import MAIN, Project

UNIT = '#include "scale.h"\nint part(int);\nint answer(int n)\n{\n    return SCALE * n + part(n);\n}\n'
PART = '#include "scale.h"\nint part(int n)\n{\n    return 100 * SCALE + n % 2;\n}\n'
SOURCES = {"main.c": MAIN, "unit.c": UNIT, "part.c": PART}


def project_with_header(root: Path) -> Project:
    (root / "include").mkdir(parents=True)
    (root / "include/scale.h").write_text("#define SCALE 3\n")
    return Project(root, SOURCES, compile_flags=["-Iinclude"])


def test_a_header_saved_as_soon_as_watching_begins(tmp_path, watching):
    """What the units include is not gathered yet: nothing but that is waited for."""
    project = project_with_header(tmp_path / "p")
    session = watching(project, "spawn", "./program", "--watch", "src", "--watch", "include")
    assert session.ask(1) == "304"
    (project.root / "include/scale.h").write_text("#define SCALE 4\n")
    applied = session.event("applied")
    assert (applied["generation"], {f["name"] for f in applied["functions"]}) == (1, {"answer", "part"})
    assert session.ask(1) == "405"
    (project.root / "include/scale.h").write_text("#define SCALE 4 +\n")
    assert session.event("applied", "build_failed")["event"] == "build_failed"
    (project.root / "include/scale.h").write_text("#define SCALE 5\n")
    assert session.event("applied", "build_failed")["generation"] == 2
    assert session.ask(1) == "506"


def test_without_compile_commands_the_debug_information_says_which_units_there_are(tmp_path, watching):
    project = project_with_header(tmp_path / "p")
    (project.sources / "scale.h").write_text("#define SCALE 3\n")
    project.build()
    (project.root / "compile_commands.json").unlink()
    session = watching(project, "spawn", "./program", "--watch", ".")
    (project.sources / "scale.h").write_text("#define SCALE 4\n")
    assert {f["name"] for f in session.event("applied", "refused")["functions"]} == {"answer", "part"}
    assert session.ask(1) == "405"


def test_a_checkout_is_one_generation(tmp_path, watching):
    count = 40
    sources = {f"part{n}.c": f"int part{n}(int n)\n{{\n    return n * 3 + 1;\n}}\n" for n in range(count)}
    heads = "".join(f"int part{n}(int);\n" for n in range(count))
    sum_ = " + ".join(f"part{n}(n)" for n in range(count))
    sources["unit.c"] = f"{heads}int answer(int n)\n{{\n    return {sum_};\n}}\n"
    project = Project(tmp_path / "p", {"main.c": MAIN, **sources})
    git = ["git", "-C", str(project.root), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=old"]

    def run(*command: str) -> None:
        subprocess.run([*git, *command], check=True, capture_output=True)

    for command in (["init"], ["add", "src"], ["commit", "-m", "old"], ["checkout", "-b", "new"]):
        run(*command)
    for n in range(count):
        project.edit(f"part{n}.c", "n * 3", f"n * {n}")
    run("commit", "-a", "-m", "new")
    run("checkout", "old")
    session = watching(project, "spawn", "./program", "--watch", "src")
    assert session.ask(1) == str(4 * count)
    run("checkout", "new")
    applied = session.event("applied")
    assert (applied["generation"], len(applied["functions"])) == (1, count - 1)
    assert session.ask(1) == str(sum(range(count)) + count)
    run("checkout", "old")
    assert session.event("applied")["generation"] == 2
    assert session.ask(1) == str(4 * count)


MAKEFILE = """\
program: main.o unit.o part.o
\tgcc -o $@ $^ -Wl,-z,now
%.o: src/%.c include/scale.h
\tgcc -g -O2 -Iinclude -c $< -o $@
"""


def test_two_watches_that_build_in_one_tree_both_get_what_one_of_them_built(tmp_path, watching):
    """The second finds nothing to build; what it has not taken yet is outstanding all the same."""
    project = project_with_header(tmp_path / "p")
    (project.root / "compile_commands.json").unlink()
    (project.root / "Makefile").write_text(MAKEFILE)
    both = [watching(project, "spawn", "./program", "--watch", "src", "--build", "make -s") for _ in range(2)]
    project.edit("unit.c", "SCALE * n", "7 * n")
    for session in both:
        assert session.event("applied", "unchanged")["event"] == "applied"
        assert session.ask(1) == "308"


def test_a_make_in_another_window_does_not_keep_the_edit_from_going_live(tmp_path, watching):
    """What was saved is built already when our own build begins, and is still to be made live."""
    project = project_with_header(tmp_path / "p")
    (project.root / "compile_commands.json").unlink()
    (project.root / "Makefile").write_text(MAKEFILE)
    session = watching(project, "spawn", "./program", "--watch", "src", "--build", "make -s")
    turn = os.open(project.root, os.O_RDONLY)
    fcntl.flock(turn, fcntl.LOCK_EX)  # as another watch does while it builds
    project.edit("unit.c", "SCALE * n", "7 * n")
    session.event("saved")
    subprocess.run(["make", "-s"], cwd=project.root, check=True)
    os.close(turn)
    assert session.event("applied", "unchanged")["event"] == "applied"
    assert session.ask(1) == "308"


def test_two_watches_on_one_process(tmp_path, watching):
    project = project_with_header(tmp_path / "p")
    with project.running() as program:
        both = [watching(project, "attach", program.pid, "--watch", "src") for _ in range(2)]
        for number in range(3):
            path = project.sources / "part.c"
            path.write_text(PART.replace("100", str(200 + number)))
            seen = sorted(session.event("applied", "unchanged", "refused")["event"] for session in both)
            assert seen == ["applied", "unchanged"]
            assert program.ask(0) == str(3 * (200 + number))


def test_a_new_source_and_its_command(tmp_path, watching):
    project = project_with_header(tmp_path / "p")
    session = watching(project, "spawn", "./program", "--watch", ".")
    (project.sources / "new.c").write_text("int fresh(int n)\n{\n    return 50 * n;\n}\n")
    assert session.event("refused", "unchanged")["reason"] == "no-compile-command"
    database = project.root / "compile_commands.json"
    entries = json.loads(database.read_text())
    entries.append({**entries[0], "file": "src/new.c", "arguments": ["gcc", "-g", "-O2", "-c", "src/new.c"]})
    database.write_text(json.dumps(entries))
    assert session.event("unchanged", "refused", "applied")["event"] == "unchanged"
    (project.sources / "unit.c").write_text("int fresh(int);\n" + UNIT.replace("part(n);", "part(n) + fresh(n);"))
    assert {f["name"] for f in session.event("applied", "refused")["functions"]} == {"answer", "fresh"}
    assert session.ask(1) == "354"
