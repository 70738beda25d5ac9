#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Looks at what was built, with nm and readelf.

    symbols.py exports LIBRARY HEADER   LIBRARY exports exactly the functions that HEADER declares with MOE_API, under
                                        their version, and its soname carries the major version
    symbols.py needed FILE...           no FILE needs a CUDA library, so that it starts where there is no driver
"""
import re
import subprocess
import sys

CUDA_LIBRARY = re.compile(r"^lib(cuda|cublas|nvrtc|nvidia|nccl|nvJitLink)", re.I)


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def declared_functions(header):
    header = re.sub(r"/\*[\s\S]*?\*/|^\s*#.*$", "", header, flags=re.M)
    return set(re.findall(r"\bMOE_API\b[^;(]*?\b(moe_\w+)\s*\(", header))


def compare_exports(nm_output, declared):
    """What is wrong with the lines of `nm -D --defined-only`."""
    wrong, exported = [], set()
    for line in nm_output.splitlines():
        _, kind, symbol = line.split()
        name, _, version = symbol.partition("@@")
        if kind == "A":
            continue  # the name of the version itself
        if kind != "T" or version != "LIBMOE_0":
            wrong.append(f"{symbol}: exported as '{kind}', expected a function of version LIBMOE_0")
        exported.add(name)
    wrong += [f"{name}: exported, but moe.h does not declare it" for name in sorted(exported - declared)]
    wrong += [f"{name}: declared in moe.h, but not exported" for name in sorted(declared - exported)]
    return wrong


def needed_libraries(readelf_output):
    return re.findall(r"\(NEEDED\).*\[(.+)\]", readelf_output)


def check_the_check():
    declared = declared_functions(
        "#define MOE_API __attribute__((x(\"y\")))\n/* MOE_API int moe_not(void); */\n"
        "MOE_API const char *moe_a(int\n x);\nMOE_API void moe_b(void);\nstatic inline int moe_c(void) {}"
    )
    assert declared == {"moe_a", "moe_b"}, declared
    listing = "0 A LIBMOE_0\n1 T moe_a@@LIBMOE_0\n2 T moe_b@@LIBMOE_0\n"
    assert not compare_exports(listing, declared)
    assert len(compare_exports(listing + "3 T moe_c@@LIBMOE_0\n", declared)) == 1
    assert len(compare_exports("1 T moe_a@@LIBMOE_0\n", declared)) == 1
    assert len(compare_exports("1 D moe_a@@LIBMOE_0\n2 T moe_b\n", declared)) == 2
    assert needed_libraries(" 0x1 (NEEDED)   Shared library: [libcudart.so.13]") == ["libcudart.so.13"]
    assert CUDA_LIBRARY.match("libcudart.so.13") and CUDA_LIBRARY.match("libcuda.so.1")


def exports(library, header):
    with open(header, encoding="utf-8") as file:
        text = file.read()
    declared = declared_functions(text)
    wrong = compare_exports(output("nm", "-D", "--defined-only", library), declared)
    major = re.search(r"define MOE_VERSION_MAJOR (\d+)", text).group(1)
    soname = re.search(r"\(SONAME\).*\[(.+)\]", output("readelf", "-d", library))
    if not soname or soname.group(1) != f"libmoe.so.{major}":
        wrong.append(f"soname is {soname and soname.group(1)}, expected libmoe.so.{major}")
    if not declared:
        wrong.append(f"{header} declares no function")
    return wrong, f"{len(declared)} functions"


def needed(*files):
    wrong = []
    for file in files:
        libraries = needed_libraries(output("readelf", "-d", file))
        if not any(name.startswith("libc.so") for name in libraries):
            wrong.append(f"{file}: needs no libc, so this is not a dynamic binary")
        wrong += [f"{file}: needs {name}" for name in libraries if CUDA_LIBRARY.match(name)]
    return wrong, f"{len(files)} files"


def main():
    check_the_check()
    wrong, seen = {"exports": exports, "needed": needed}[sys.argv[1]](*sys.argv[2:])
    for line in wrong:
        print(line)
    print(f"{seen}, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
