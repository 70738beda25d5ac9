#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks that tools/examples/forward.c chooses the experts and gives the output that `moe forward` does.

    example.py MOE EXAMPLE
"""

import os
import re
import subprocess
import sys
import tempfile

import tensors

TOKENS, HIDDEN = 8, 64


def run(*words, code=0):
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert done.returncode == code, f"{words}: exit code {done.returncode}: {done.stderr}"
    return done.stdout, done.stderr


def main():
    moe, example = map(os.path.abspath, sys.argv[1:3])
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        run(moe, "synth", "--like", "tiny-mixtral", "--output", "m")
        # The example's hidden states, as its source computes them.
        x = [((i * 2654435761 & (1 << 64) - 1) >> 8) % 2048 / 1024 - 1 for i in range(TOKENS * HIDDEN)]
        tensors.write("x", {"hidden_states": ("F32", [TOKENS, HIDDEN], tensors.pack("F32", x))})
        run(moe, "forward", "--model", "m", "--input", "x", "--output", "y")
        y = tensors.read("y")
        ids, output = tensors.values(y, "topk_ids"), tensors.values(y, "hidden_states")

        lines = run(example, "m")[0].splitlines()
        assert len(lines) == TOKENS, lines
        for t, line in enumerate(lines):
            found = re.fullmatch(r"token (\d+): experts (\d+) (\d+), output (\S+) (\S+) (\S+) \.\.\.", line)
            assert found and int(found[1]) == t, line
            assert [int(found[2]), int(found[3])] == ids[2 * t : 2 * t + 2], line
            for i in range(3):
                assert abs(float(found[4 + i]) - output[t * HIDDEN + i]) < 1e-4, line

        for words in ([], ["nowhere"], ["m", "1"]):
            out, err = run(example, *words, code=1)
            assert out == "" and err.count("\n") == 1, (words, out, err)
        os.chdir("/")


if __name__ == "__main__":
    main()
