#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sums the test logs of meson (testlog.json) given as arguments and prints "N passed, N failed, N skipped".

A log that is missing or empty counts as one failure: its run died before the first test. Exit status 1 if any failed.
"""
import json
import sys

PASSED = ("OK", "EXPECTEDFAIL")
SKIPPED = ("SKIP", "IGNORED")


def main(paths):
    passed = failed = skipped = 0
    for path in paths:
        try:
            with open(path, encoding="utf-8") as log:
                results = [(test["name"], test["result"]) for test in map(json.loads, log)]
        except (OSError, ValueError, KeyError):
            results = []
        if not results:
            results = [(f"no results in {path}", "FAIL")]
        for name, result in results:
            if result in PASSED:
                passed += 1
            elif result in SKIPPED:
                skipped += 1
            else:
                failed += 1
                print(f"failed: {name}")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
