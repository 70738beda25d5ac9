#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Installs the package into a temporary directory and uses it from there, as another project would.

    installed.py ROOT BUILD COMPILER MESON...

`meson install`, then pkg-config, then the example tools/examples/forward.c compiled against the installed header, linked
to the shared library and to the static one, and run on a checkpoint.
"""
import os
import pathlib
import subprocess
import sys
import tempfile


def run(*command, **kwargs):
    return subprocess.run([str(word) for word in command], check=True, text=True, stdin=subprocess.DEVNULL, **kwargs)


def find(directory, pattern):
    found = sorted(directory.rglob(pattern))
    if not found:
        sys.exit(f"the installed package has no {pattern}")
    return found[0]


class Package:
    def __init__(self, directory):
        self.pc = find(directory, "libmoe.pc")
        self.include = find(directory, "moe.h").parent
        self.shared = find(directory, "libmoe.so")
        self.static = find(directory, "libmoe.a")
        self.command = find(directory, "bin/moe")
        # The .pc file names the final prefix; here the package lies below the temporary directory.
        prefix = next(line[len("prefix="):] for line in self.pc.read_text().splitlines() if line.startswith("prefix="))
        self.prefix = directory / prefix.lstrip("/")

    def flags(self, *options):
        path = ":".join(filter(None, [str(self.pc.parent), os.environ.get("PKG_CONFIG_PATH")]))
        result = run("pkg-config", f"--define-variable=prefix={self.prefix}", *options, "libmoe", stdout=subprocess.PIPE,
                     env={**os.environ, "PKG_CONFIG_PATH": path})
        return result.stdout.split()

    def static_flags(self):
        """--static --libs, with the archive in the place of -lmoe: the linker would take the shared library."""
        return [self.static if word == "-lmoe" else word for word in self.flags("--static", "--libs")]


def main():
    root, build, compiler, *meson = sys.argv[1:]
    root = pathlib.Path(root)
    with tempfile.TemporaryDirectory() as directory:
        directory = pathlib.Path(directory)
        run(*meson, "install", "-C", build, "--no-rebuild", "--quiet", "--destdir", directory)
        package = Package(directory)

        version = run("sh", root / "tools" / "version.sh", stdout=subprocess.PIPE).stdout.strip()
        said = " ".join(package.flags("--modversion"))
        if said != version:
            sys.exit(f"pkg-config says version {said}, moe.h {version}")
        headers = sorted(path.name for path in package.include.iterdir())
        if headers != ["moe.h"]:
            sys.exit(f"installed headers: {headers}, expected moe.h alone")

        strict = ["-std=c11", "-Wall", "-Wextra", "-Werror"]
        source = root / "tools" / "examples" / "forward.c"
        model = root / "tests" / "fixtures" / "mixtral-bf16"
        programs = {"shared": package.flags("--libs"), "static": package.static_flags()}
        for name, libraries in programs.items():
            program = directory / f"example-{name}"
            run(*compiler.split(), *strict, *package.flags("--cflags"), source, "-o", program, *libraries)
            path = ":".join(filter(None, [str(package.shared.parent), os.environ.get("LD_LIBRARY_PATH")]))
            run(program, model, env={**os.environ, "LD_LIBRARY_PATH": path} if name == "shared" else None)
        needed = run("readelf", "-d", directory / "example-static", stdout=subprocess.PIPE).stdout
        if "libmoe" in needed:
            sys.exit("the program that was linked to the static library needs libmoe.so")
        run(package.command, "--version")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(str(error))
