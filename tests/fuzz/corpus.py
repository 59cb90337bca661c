"""Good objects to make mutants of, and the programs that run what they change.

`build` compiles everything into a folder: `pie` and `fixed`, two programs of many variants of a C unit, a C++ unit
and an assembly unit; below `good`, an edited object of each variant, and what `ld -r` and `ar` make of them.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).parent / "sources"
SECTIONS = ("-ffunction-sections", "-fdata-sections")
C, CPP, ASSEMBLY, TINY = "unit.c", "unit.cc", "every.S", "tiny.c"


@dataclass(frozen=True, slots=True)
class Variant:
    """A unit compiled in one way. `edited`: flags of the edited object only."""

    name: str
    source: str
    command: tuple[str, ...]
    edited: tuple[str, ...] = ()


PIE = (
    Variant("gcc_plain", C, ("gcc", "-O0", "-g")),
    Variant("gcc_sections", C, ("gcc", "-O2", "-g"), SECTIONS),
    Variant("gcc_bare", C, ("gcc", "-O2", "-fcommon", "-fno-asynchronous-unwind-tables")),
    Variant("gcc_compressed", C, ("gcc", "-O1", "-g", "-gz", "-fPIC")),
    Variant("gcc_dynamic", C, ("gcc", "-Os", "-fPIC", "-fno-plt", "-ftls-model=global-dynamic"), SECTIONS),
    Variant("gcc_local", C, ("gcc", "-O2", "-fPIC", "-ftls-model=local-dynamic", "-gdwarf-4")),
    Variant("gcc_descriptor", C, ("gcc", "-O2", "-fPIC", "-mtls-dialect=gnu2"), SECTIONS),
    Variant("gcc_initial", C, ("gcc", "-O3", "-fPIC", "-ftls-model=initial-exec", "-g")),
    Variant("clang_plain", C, ("clang", "-O0", "-g", "-fPIC", "-fdata-sections")),
    Variant("clang_sections", C, ("clang", "-O2", "-fPIE"), SECTIONS),
    Variant("clang_addresses", C, ("clang", "-O1", "-g", "-fPIE", "-faddrsig")),
    Variant("gcc_classes", CPP, ("g++", "-O2", "-g")),
    Variant("gcc_groups", CPP, ("g++", "-O0"), SECTIONS),
    Variant("clang_classes", CPP, ("clang++", "-O2", "-g", "-fPIC")),
    Variant("tiny", TINY, ("gcc", "-O1", "-g")),
)
FIXED = (
    Variant("gcc_fixed", C, ("gcc", "-O2", "-fno-pie", "-g"), SECTIONS),
    Variant("gcc_large", C, ("gcc", "-O1", "-fno-pie", "-mcmodel=large", "-fdata-sections")),
    Variant("clang_fixed", C, ("clang", "-O2", "-fno-pic", "-fdata-sections")),
    Variant("every", ASSEMBLY, ("gcc",)),
)
PROGRAMS = {"pie": PIE, "fixed": FIXED}

MAIN = """\
#include <stdio.h>
#include <stdlib.h>
__thread int shared_number = 1;
{declarations}
int main(void)
{{
    char line[80];
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (fgets(line, sizeof line, stdin)) {{
        int n = atoi(line);
        printf("%d\\n", 0{calls});
    }}
    return 0;
}}
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """A good object or archive, and the program that has what it changes."""

    name: str
    program: str
    data: bytes


def build(folder: Path) -> None:
    """Compile the programs and the good objects into a folder."""
    good = folder / "good"
    good.mkdir(parents=True)
    for program, variants in PROGRAMS.items():
        objects = [_compiled(folder, v, folder / f"{v.name}.o") for v in variants]
        for v in variants:
            _compiled(folder, v, good / f"{program}-{v.name}.o", "-DEDIT", *v.edited)
        _link(folder, program, objects)
    _run(good, "ld", "-r", "-o", "pie-joined.o", "pie-gcc_sections.o", "pie-gcc_groups.o")
    long_name = "an_object_with_a_name_that_is_too_long_for_a_header.o"
    (good / long_name).write_bytes((good / "pie-gcc_bare.o").read_bytes())
    _run(good, "ar", "rc", "pie-plain.a", "pie-gcc_plain.o", long_name)
    _run(good, "ar", "rcT", "pie-thin.a", "pie-clang_sections.o", long_name)
    _run(good, "ar", "rcS", "fixed-without_index.a", "fixed-gcc_large.o", "fixed-every.o")


def samples(folder: Path) -> tuple[Sample, ...]:
    """Return what `build` made, in an order that depends on the names only."""
    found = [p for pattern in ("*.o", "*.a") for program in PROGRAMS for p in folder.glob(f"good/{program}-{pattern}")]
    return tuple(Sample(p.name, p.name.partition("-")[0], p.read_bytes()) for p in sorted(found))


def _compiled(folder: Path, variant: Variant, output: Path, *flags: str) -> Path:
    suffix = Path(variant.source).suffix
    source = folder / f"{variant.name}{suffix}"  # the name tells the units of the variants apart
    source.write_bytes((SOURCES / variant.source).read_bytes())
    _run(folder, *variant.command, f"-DPREFIX={variant.name}", *flags, "-c", source.name, "-o", str(output))
    return output


def _link(folder: Path, program: str, objects: list[Path]) -> None:
    names = [v.name for v in PROGRAMS[program]]
    main = folder / f"{program}-main.c"
    declarations = "\n".join(f"int {name}_work(int);" for name in names)
    main.write_text(MAIN.format(declarations=declarations, calls="".join(f" + {name}_work(n)" for name in names)))
    kind = ("-pie", "-fPIE") if program == "pie" else ("-no-pie", "-fno-pie")
    compiled = _compiled_main(folder, main, kind[1])
    _run(folder, "g++", kind[0], "-Wl,-z,now", "-o", program, str(compiled), *map(str, objects))


def _compiled_main(folder: Path, main: Path, flag: str) -> Path:
    output = main.with_suffix(".o")
    _run(folder, "gcc", "-O1", flag, "-c", main.name, "-o", output.name)
    return output


def _run(folder: Path, *command: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
