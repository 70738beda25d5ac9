#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the examples of README.md, so that they stay true.

    readme.py ROOT BUILD COMPILER

Blocks fenced as `sh` run in order in one temporary directory, with `moe` on PATH and without a GPU; blocks fenced as `c`
are whole programs, compiled against moe.h and the shared library and run there after them, with the checkpoint that the
shell blocks wrote as their argument. Blocks in other languages (`console`, `text`) are for reading only. Also checks
that files which the README names exist.
"""
import os
import pathlib
import re
import subprocess
import sys
import tempfile

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
ROOMS = ("config", "models", "router", "kernels", "runtime", "tests", "tools")


def blocks(text, language):
    return [(text.count("\n", 0, match.start()) + 1, match.group(2)) for match in FENCE.finditer(text)
            if match.group(1) == language]


def run(what, command, **kwargs):
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            **kwargs)
    print(f"--- {what}\n{result.stdout}", end="")
    if result.returncode != 0:
        sys.exit(f"{what}: exit status {result.returncode}")


def missing_files(root, text):
    """Files and folders that the text names in `code`, in a link or in a diagram, and that are not there."""
    rooms = "|".join(ROOMS)
    named = set(re.findall(rf"`((?:{rooms})/[\w./-]*)`", text)) | set(re.findall(r"\]\(([\w./-]+)\)", text))
    for _, diagram in blocks(text, "text"):
        named |= set(re.findall(rf"(?<!\S)((?:{rooms})/[\w./]*)", diagram))
    return sorted(name for name in named if not (root / name).exists())


def main():
    root, build = (pathlib.Path(path).resolve() for path in sys.argv[1:3])
    compiler = sys.argv[3].split()
    text = (root / "README.md").read_text(encoding="utf-8")
    shell, programs = blocks(text, "sh"), blocks(text, "c")
    if not shell or not programs:
        sys.exit("README.md has no examples fenced as `sh` or as `c`")
    missing = missing_files(root, text)
    if missing:
        sys.exit(f"README.md names what is not there: {', '.join(missing)}")

    environment = {**os.environ, "PATH": f"{build / 'tools'}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "",
                   "LD_LIBRARY_PATH": ":".join(filter(None, [str(build / "runtime"), os.environ.get("LD_LIBRARY_PATH")]))}
    with tempfile.TemporaryDirectory() as directory:
        for line, script in shell:
            run(f"README.md:{line}", ["sh", "-eu", "-c", script], cwd=directory, env=environment)
        model = next(pathlib.Path(directory).glob("*/config.json")).parent
        for line, source in programs:
            program = pathlib.Path(directory) / f"example_{line}"
            program.with_suffix(".c").write_text(source, encoding="utf-8")
            run(f"README.md:{line}: compiling",
                [*compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", "-I", root / "runtime" / "include",
                 program.with_suffix(".c"), "-o", program, "-L", build / "runtime", "-lmoe"])
            run(f"README.md:{line}", [program, model], cwd=directory, env=environment)


if __name__ == "__main__":
    main()
