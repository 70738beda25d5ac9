#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that dependencies between the rooms go one way, by their #include lines.

    includes.py ROOT

The order is config <- models <- router <- kernels <- runtime <- tools: a file may include its own room and those before
it. moe.h and kernels/cuda/common/ may be included from anywhere. Beyond the order: the router and the kernels see
neither JSON nor files, the public header only the C library, and only runtime/dist knows NCCL. Tests may include
everything, and nothing includes tests.
"""
import pathlib
import re
import sys
import tempfile

ROOMS = ("config", "models", "router", "kernels", "runtime", "tools")
SOURCES = (".c", ".h", ".cu", ".cuh", ".inc")
INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.M)
# What reads or writes files.
FILES = ("config/config.h", "config/file.h", "config/json.h", "config/output.h", "config/tuned.h")
# What a public header may include.
C_LIBRARY = ("stdbool.h", "stddef.h", "stdint.h", "string.h")


def complaint(file, quote, header):
    """Why `file` (relative to the root) must not include `header`, or None."""
    room = file.split("/")[0]
    if "nccl" in header.lower() and not file.startswith("runtime/dist/"):
        return "only runtime/dist may include NCCL"
    if file == "runtime/include/moe.h":
        return None if header in C_LIBRARY else "the public header includes the C library only"
    blind = room in ("router", "kernels")
    if quote == "<":
        return f"{room} must not see JSON" if blind and "cjson" in header.lower() else None
    if header == "moe.h" or header.startswith("kernels/cuda/common/"):
        return None
    if ".." in header.split("/"):
        return "name headers from the root, without .."
    target = header.split("/")[0] if "/" in header else room
    if target not in ROOMS:
        return f"'{target}' is no room that may be included"
    if ROOMS.index(target) > ROOMS.index(room):
        return f"{room} comes before {target}"
    if blind and (target == "models" or header in FILES):
        return f"{room} must not see JSON or files"
    return None


def check(root):
    """All violations under root, as lines, and how many includes were looked at."""
    found, seen = [], 0
    for room in ROOMS:
        for path in sorted((root / room).rglob("*")):
            if path.suffix not in SOURCES or not path.is_file():
                continue
            file = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8")
            for match in INCLUDE.finditer(text):
                seen += 1
                why = complaint(file, *match.groups())
                if why:
                    line = text.count("\n", 0, match.start(2)) + 1
                    found.append(f"{file}:{line}: includes {match.group(2)}: {why}")
    return found, seen


BAD = {
    "config/a.c": '#include "models/model.h"',
    "models/a.c": '#include "router/router.h"',
    "router/a.cu": '#include "kernels/kernels.h"',
    "router/b.c": '#include "config/json.h"',
    "router/c.c": '#include "config/output.h"',
    "kernels/cuda/simple/a.cu": '  #  include "runtime/internal.h"',
    "kernels/ref/a.c": "#include <cjson/cJSON.h>",
    "kernels/ref/b.h": '#include "models/safetensors.h"',
    "kernels/cpu/a.c": '#include "../ref/gemm.h"',
    "runtime/a.c": '#include "tools/cli.h"',
    "runtime/b.c": "#include <nccl.h>",
    "runtime/include/moe.h": "#include <cuda_runtime.h>",
    "tools/a.c": '#include "tests/unit/helper.h"',
}
GOOD = {
    "config/b.c": '#include <cjson/cJSON.h>\n#include "config/json.h"\n#include "moe.h"',
    "config/c.c": '#include "families.inc"',
    "router/c.cu": '#include "kernels/cuda/common/reduce.cuh"\n#include <cuda_runtime.h>',
    "kernels/ref/c.c": '#include "config/error.h"\n#include "router/router.h"',
    "runtime/c.c": '#include "models/model.h"\n#include "kernels/kernels.h"',
    "runtime/dist/a.c": "#include <nccl.h>",
    "tools/b.c": '#include "runtime/internal.h"',
}


def check_the_check():
    """The rules above on a made-up tree: each bad file is found, and no good one."""
    with tempfile.TemporaryDirectory() as directory:
        root = pathlib.Path(directory)
        for name, text in {**BAD, **GOOD}.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"/* made up */\n{text}\n", encoding="utf-8")
        found, _ = check(root)
        named = sorted(line.split(":")[0] for line in found)
        if named != sorted(BAD):
            sys.exit(f"the check itself is wrong: expected {sorted(BAD)}, found {named}")


def main():
    check_the_check()
    found, seen = check(pathlib.Path(sys.argv[1]))
    for line in found:
        print(line)
    if seen < 20:
        sys.exit(f"only {seen} includes seen: is {sys.argv[1]} the root of the project?")
    print(f"{seen} includes, {len(found)} against the direction of the rooms")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
