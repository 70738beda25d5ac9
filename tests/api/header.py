#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles header.c against moe.h as strict C99 and as C++17, links it to the shared library and runs it.

    header.py HEADER.C INCLUDE_DIR LIBRARY_DIR COMPILER C99|C++17
"""
import os
import pathlib
import subprocess
import sys
import tempfile

LANGUAGES = {"C99": ["-x", "c", "-std=c99"], "C++17": ["-x", "c++", "-std=c++17"]}


def main():
    source, include, library, compiler, language = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        program = pathlib.Path(directory) / "header"
        subprocess.run(
            [*compiler.split(), *LANGUAGES[language], "-pedantic", "-Wall", "-Wextra", "-Werror", "-I", include, source,
             "-x", "none", "-L", library, "-lmoe", "-o", program],
            check=True)
        path = ":".join(filter(None, [library, os.environ.get("LD_LIBRARY_PATH")]))
        subprocess.run([program], check=True, env={**os.environ, "LD_LIBRARY_PATH": path})


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(str(error))
