"""The Cython extensions; everything else is in pyproject.toml.

Every `X.pyx` below daemon/ becomes an extension of the same dotted name, next to its source. `POINTSMAN_DEBUG_BUILD=1`
builds with bounds checks and assertions.
"""

import os
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

SOURCES = "src"
QUIET = ["-Wno-unused-function"]  # headers of static functions, of which an extension uses some
HEADERS = [f"{SOURCES}/pointsman/daemon/shm"]  # what is cimported from there names them
IS_DEBUG = os.environ.get("POINTSMAN_DEBUG_BUILD") == "1"


def find_extensions() -> list[Extension]:
    # os.walk, because a glob's ** stops at links, and in a checkout src/pointsman/daemon is one.
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(f"{SOURCES}/pointsman/daemon", followlinks=True)
        for name in names
        if name.endswith(".pyx")
    ]
    return [describe_extension(path) for path in sorted(files)]


def describe_extension(path: Path) -> Extension:
    name = ".".join(path.relative_to(SOURCES).with_suffix("").parts)
    if IS_DEBUG:
        return Extension(
            name, [str(path)], include_dirs=HEADERS, extra_compile_args=["-O1", "-g", "-UNDEBUG", *QUIET]
        )
    return Extension(
        name,
        [str(path)],
        include_dirs=HEADERS,
        define_macros=[("CYTHON_WITHOUT_ASSERTIONS", "1")],
        extra_compile_args=["-O2", *QUIET],
    )


# Here and not in the heads of the sources: what a source says itself, a debug build could not change.
directives: dict[str, object] = {"language_level": 3, "boundscheck": IS_DEBUG, "wraparound": False}
if IS_DEBUG:
    directives |= {"nonecheck": True, "initializedcheck": True}

extensions = find_extensions()
setup(
    # cythonize refuses an empty list in some versions.
    ext_modules=cythonize(extensions, include_path=[SOURCES], compiler_directives=directives, force=IS_DEBUG or None)
    if extensions
    else []
)
