"""The Cython extensions; everything else is in pyproject.toml.

Every `X.pyx` below daemon/ becomes an extension of the same dotted name, next to its source; so does every `X.py` that
has an `X.pxd` beside it, which gives its classes C structs. `POINTSMAN_DEBUG_BUILD=1` builds with bounds checks and
assertions.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SOURCES = "src"
QUIET = ["-Wno-unused-function"]  # headers of static functions, of which an extension uses some
HEADERS = [f"{SOURCES}/pointsman/daemon/shm"]  # what is cimported from there names them
CORES = len(os.sched_getaffinity(0))
IS_DEBUG = os.environ.get("POINTSMAN_DEBUG_BUILD") == "1"


def find_extensions() -> list[Extension]:
    # os.walk, because a glob's ** stops at links, and in a checkout src/pointsman/daemon is one.
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(f"{SOURCES}/pointsman/daemon", followlinks=True)
        for name in names
        if name.endswith(".pyx") or (name.endswith(".py") and f"{name[:-3]}.pxd" in names)
    ]
    return [describe_extension(path) for path in sorted(files)]


def describe_extension(path: Path) -> Extension:
    name = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    if IS_DEBUG:
        return Extension(name, [str(path)], include_dirs=HEADERS, extra_compile_args=["-O1", "-g1", "-UNDEBUG", *QUIET])
    return Extension(
        name,
        [str(path)],
        include_dirs=HEADERS,
        define_macros=[("CYTHON_WITHOUT_ASSERTIONS", "1")],
        extra_compile_args=["-O2", "-g0", *QUIET],
    )


# Here and not in the heads of the sources: what a source says itself, a debug build could not change.
native: dict[str, object] = {"language_level": 3, "boundscheck": IS_DEBUG, "wraparound": False, "auto_pickle": False}
if IS_DEBUG:
    native |= {"nonecheck": True, "initializedcheck": True}
# Python stays Python: annotations are for the type checker, what is a C type the .pxd files say.
augmented: dict[str, object] = {
    "language_level": 3,
    "annotation_typing": False,
    "auto_pickle": False,
    "nonecheck": IS_DEBUG,
}


def compiled(suffix: str, directives: dict[str, object]) -> list[Extension]:
    found = [extension for extension in find_extensions() if extension.sources[0].endswith(suffix)]
    if not found:  # cythonize refuses an empty list in some versions
        return []
    force = IS_DEBUG or None
    return list(cythonize(found, nthreads=CORES, include_path=[SOURCES], compiler_directives=directives, force=force))


setup(
    ext_modules=compiled(".pyx", native) + compiled(".py", augmented),
    options={"build_ext": {"parallel": CORES}},
)
