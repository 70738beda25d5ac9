#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Tests the moe command from outside: what it prints, what it writes, and how it fails.

    run.py MOE [--fixtures DIR] [--malformed PROGRAM] [--update] [TEST...]

--update rewrites golden/ from what the command prints now. Nothing here depends on timing: where a process is killed,
whatever moment that hits must leave a good state.
"""

import argparse
import csv
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import tensors

HERE = os.path.dirname(os.path.abspath(__file__))
COMMANDS = ["forward", "inspect", "synth", "bench", "tune", "replay", "doctor"]
args = None
skipped = []


class Failed(Exception):
    pass


def check(condition, message):
    if not condition:
        raise Failed(message)


# ---- Running the command ----


def moe(*words, code=0, **kwargs):
    """Runs the command and returns (stdout, stderr); checks the exit code."""
    done = subprocess.run([args.moe, *map(str, words)], capture_output=True, text=True, **kwargs)
    shown = " ".join(map(str, words))
    check(done.returncode == code, f"moe {shown}: exit code {done.returncode}, expected {code}: {done.stderr.strip()}")
    return done.stdout, done.stderr


def fails(code, pattern, *words, **kwargs):
    """The command fails with this code, prints nothing on stdout and one line on stderr, which matches."""
    out, err = moe(*words, code=code, **kwargs)
    shown = " ".join(map(str, words))
    check(out == "", f"moe {shown}: printed on stdout: {out!r}")
    check(err.startswith("moe: ") and err.count("\n") == 1 and err.endswith("\n"), f"moe {shown}: stderr is {err!r}")
    check(re.search(pattern, err), f"moe {shown}: {err!r} does not match {pattern!r}")
    return err


def report(*words, **kwargs):
    return json.loads(moe(*words, "--json", **kwargs)[0])


def have_gpu():
    return bool(report("doctor")["gpus"])


# ---- Golden output ----

MASKS = [
    (r"\d+(\.\d+)? (bytes|[KMGT]B)/s", "RATE"),
    (r"\d+(\.\d+)? (s|ms|us)\b", "TIME"),
    (r"(?m)^device .*", "device   DEVICE"),
    (r"error \d\S*", "error ERROR"),
    (r"(?m)^( *(?:cublas-loop|cublas-grouped|padded|simple|decode|prefill) +).*", r"\1DEPENDS"),
    (r"(?m)^(layout +).*", r"\1DEPENDS"),
]


def golden(name, *words):
    text = moe(*words)[0]
    for pattern, mask in MASKS:
        text = re.sub(pattern, mask, text)
    path = os.path.join(HERE, "golden", name + ".txt")
    if args.update:
        with open(path, "w") as f:
            f.write(text)
    with open(path) as f:
        expected = f.read()
    if text != expected:
        for number, (got, want) in enumerate(zip(text.splitlines() + [""], expected.splitlines() + [""]), 1):
            check(got == want, f"golden/{name}.txt:{number}: got {got!r}, expected {want!r}")
        raise Failed(f"golden/{name}.txt: {text.count(chr(10))} lines, expected {expected.count(chr(10))}")


# ---- Material ----


def tiny(name="m", *options):
    """A small Mixtral and 16 tokens for it, in the current directory."""
    moe("synth", "--like", "tiny-mixtral", "--output", name, "--hidden-states", "x.safetensors", "--tokens", 16, *options)
    return name


def session(name="s"):
    """Two layers, prefill and decode, captured on the CPU."""
    tiny("m", "--layers", 2)
    x = tensors.read("x.safetensors")
    one = {"hidden_states": ("BF16", [1, 64], x["hidden_states"][2][:128])}
    tensors.write("x1.safetensors", one)
    for layer in range(2):
        for source in ("x", "x1"):
            moe("forward", "--model", "m", "--layer", layer, "--input", source + ".safetensors", "--capture", name,
                "--device", "cpu")  # fmt: skip
    return name


def relative_error(got, expected):
    norm = math.sqrt(sum(e * e for e in expected))
    return math.sqrt(sum((g - e) ** 2 for g, e in zip(got, expected))) / norm


def fixture(name):
    return os.path.join(args.fixtures, name)


# ---- Tests: each runs in an empty directory of its own ----


def test_help():
    out = moe("--help")[0]
    for name in COMMANDS:
        check(re.search(rf"(?m)^  {name} ", out), f"moe --help does not list {name}")
        lines = moe(name, "--help")[0].splitlines()
        check(lines[0].startswith(f"moe {name}: ") and lines[2] == "Examples:", f"moe {name} --help: no examples first")
        check(lines[3].startswith(f"  moe {name}"), f"moe {name} --help: the first example is {lines[3]!r}")
    check(re.fullmatch(r"moe \d+\.\d+\.\d+\n", moe("--version")[0]), "moe --version")


def test_golden():
    golden("help", "--help")
    for name in COMMANDS:
        if name != "bench":
            golden("help-" + name, name, "--help")
    golden("synth", "synth", "--like", "tiny-mixtral", "--output", "m", "--hidden-states", "x.safetensors", "--tokens",
           16, "--layers", 2)  # fmt: skip
    golden("inspect", "inspect", "--model", "m", "--layer", 1)
    shutil.copytree(fixture("qwen3_moe-bf16"), "qwen3")
    golden("inspect-dense", "inspect", "--model", "qwen3")
    run = ["forward", "--model", "m", "--input", "x.safetensors", "--device", "cpu"]
    golden("forward", *run, "--output", "y.safetensors", "--repeat", 3)
    golden("forward-capture", *run, "--layer", 1, "--capture", "s", "--path", "reference")
    golden("replay", "replay", "--model", "m", "--session", "s", "--device", "cpu", "--verify", "-v")


def test_usage():
    tiny()
    run = ["forward", "--model", "m", "--input", "x.safetensors", "--output", "y.safetensors"]
    fails(2, "no command")
    fails(2, "unknown command 'fowrard', did you mean 'forward'", "fowrard")
    fails(2, "unknown command 'zzzzzz'$", "zzzzzz")
    fails(2, "unknown option '--versoin', did you mean '--version'", "--versoin")
    fails(2, r"unknown command '\?\[31m", "\x1b[31m")
    for name in COMMANDS:
        fails(2, "unknown option '--jsno', did you mean '--json'", name, "--jsno")
        fails(2, "unknown option '-q'", name, "-q")
        fails(2, "unexpected argument 'extra'", name, "extra")
        fails(2, "option '--json' takes no value", name, "--json=1")
    fails(2, "--model is required", "forward")
    fails(2, "--input is required", "forward", "--model", "m")
    fails(2, "--output or --capture", "forward", "--model", "m", "--input", "x")
    fails(2, "unknown option '--mod'", "forward", "--mod", "m")
    fails(2, "option '--model' needs a value", "forward", "--model")
    fails(2, "--model is empty", "forward", "--model", "")
    for bad in ("1x", "-1", "", " 1", "1.5", "99999999999999999999"):
        fails(2, "--layer is '.*', expected an integer from 0 to", *run, "--layer=" + bad)
    fails(2, "--layer is 1, but m has layers 0 to 0", *run, "--layer", 1)
    fails(2, "--layer is 1, but m has layers 0 to 0", "inspect", "--model", "m", "--layer", 1)
    fails(2, "--threads is '0', expected an integer from 1", *run, "--threads", 0)
    fails(2, "--repeat is '0'", *run, "--repeat", 0)
    fails(2, "--device is 'gpu', expected auto, cpu, cuda or cuda:INDEX", *run, "--device", "gpu")
    for bad in ("cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda:99999"):
        fails(2, "--device is", *run, "--device", bad)
    fails(2, "--path is 'refrence', expected auto, .*did you mean 'reference'", *run, "--path", "refrence")
    fails(2, "--routing is 'old', expected new or given", *run, "--routing", "old")
    fails(2, "--phase belongs to --capture", *run, "--phase", "decode")
    fails(2, "--phase is 'De code'", *run, "--capture", "s", "--phase", "De code")
    fails(2, "--session is required", "replay", "--model", "m")
    fails(2, "--tolerance is '0', expected a number above 0", "replay", "--tolerance", 0)
    fails(2, "--tolerance is 'nan'", "replay", "--tolerance", "nan")
    fails(2, "--tolerance belongs to --verify", "replay", "--model", "m", "--session", "s", "--tolerance", 1)
    fails(2, "one of --like, --config and --model", "synth", "--output", "n")
    fails(2, "one of --like", "synth", "--like", "tiny-mixtral", "--model", "m", "--output", "n")
    fails(2, "--output or --hidden-states", "synth", "--like", "tiny-mixtral")
    fails(2, "belong together", "synth", "--like", "tiny-mixtral", "--tokens", 4, "--output", "n")
    fails(2, "--like is 'mixtral', expected mixtral-8x7b, ", "synth", "--like", "mixtral", "--output", "n")
    fails(2, "did you mean 'tiny-mixtral'", "synth", "--like", "tiny-mixtrla", "--output", "n")
    fails(2, "--dtype is 'fp8', expected bf16, f16 or f32", "synth", "--dtype", "fp8")
    for bad in ("0", "5XB", "-1", "1e9", "9999999999TB"):
        fails(2, "--shard-size is '.*', expected a size", "synth", "--shard-size", bad)
    fails(2, "expected at most 'num_local_experts'", "synth", "--like", "tiny-mixtral", "--top-k", 5, "--output", "n")
    fails(2, "the directory is not empty", "synth", "--like", "tiny-mixtral", "--output", "m")
    check(sorted(os.listdir()) == ["m", "x.safetensors"], f"left behind: {os.listdir()}")


def test_fixtures():
    """Every checkpoint that transformers wrote gives what transformers computed."""
    budget = {"F32": 1e-5, "BF16": 8e-3}
    for name in sorted(os.listdir(args.fixtures)):
        if name.startswith("session") or not os.path.isdir(fixture(name)):
            continue
        for case in sorted(f for f in os.listdir(fixture(name)) if f.startswith(("case", "layer"))):
            expected = tensors.read(os.path.join(fixture(name), case))
            layer = re.match(r"layer(\d+)_", case)
            choice = ["--layer", layer.group(1)] if layer else []
            for path in ("cpu", "reference"):
                moe("forward", "--model", fixture(name), "--input", os.path.join(fixture(name), case), "--output", "y",
                    "--device", "cpu", "--path", path, *choice)  # fmt: skip
                got = tensors.read("y")
                where = f"{name}/{case}, path {path}"
                check(got["hidden_states"][:2] == expected["output"][:2], f"{where}: {got['hidden_states'][:2]}")
                error = relative_error(tensors.values(got, "hidden_states"), tensors.values(expected, "output"))
                check(error <= budget[got["hidden_states"][0]], f"{where}: relative error {error:.3g}")
                check(got["topk_ids"] == expected["topk_ids"], f"{where}: other experts")
                check(set(got) == {"hidden_states", "topk_ids", "topk_weights", "router_logits"}, f"{where}: {set(got)}")


def test_fixture_sessions():
    for dtype in ("f32", "bf16"):
        for routing in ("recorded", "new"):
            for path in ("cpu", "reference"):
                result = report("replay", "--model", fixture("mixtral-" + dtype), "--session",
                                fixture("session-" + dtype), "--verify", "--routing", routing, "--device", "cpu",
                                "--path", path)  # fmt: skip
                phases = {p["phase"]: p["batches"] for p in result["phases"]}
                check(set(phases) == {"prefill", "decode"}, f"phases {phases}")
                check(result["verify"]["batches"] == sum(phases.values()), f"compared {result['verify']}")


def test_forward_inputs():
    """dtypes, no tokens, data off its alignment, the input's own name as output."""
    tiny()
    x = tensors.values(tensors.read("x.safetensors"), "hidden_states")
    run = ["forward", "--model", "m", "--device", "cpu", "--input"]
    moe(*run, "x.safetensors", "--output", "y.safetensors")
    base = tensors.values(tensors.read("y.safetensors"), "hidden_states")
    for dtype in ("F32", "F16", "BF16"):
        for padding in range(4):
            tensors.write("a", {"pad": ("I32", [0], b""), "hidden_states": (dtype, [16, 64], tensors.pack(dtype, x))},
                          padding)  # fmt: skip
            moe(*run, "a", "--output", "b")
            got = tensors.read("b")
            check(got["hidden_states"][:2] == (dtype, [16, 64]), f"{dtype}: {got['hidden_states'][:2]}")
            error = relative_error(tensors.values(got, "hidden_states"), base)
            check(error < 1e-2, f"{dtype}, padding {padding}: relative error {error}")
    moe(*run, "a", "--output", "a")
    check(tensors.read("a") == tensors.read("b"), "in place: another result")

    tensors.write("none", {"hidden_states": ("F32", [0, 64], b"")})
    moe(*run, "none", "--output", "none-y", "--capture", "s")
    shapes = {name: t[1] for name, t in tensors.read("none-y").items()}
    check(shapes == {"hidden_states": [0, 64], "topk_ids": [0, 2], "topk_weights": [0, 2], "router_logits": [0, 4]},
          f"no tokens: {shapes}")  # fmt: skip
    moe("replay", "--model", "m", "--session", "s", "--verify", "--device", "cpu")


def test_given_routing():
    tiny()
    run = ["forward", "--model", "m", "--device", "cpu", "--input"]
    moe(*run, "x.safetensors", "--output", "y")
    y, x = tensors.read("y"), tensors.read("x.safetensors")
    for ids in ("I32", "I64"):
        given = {"hidden_states": x["hidden_states"], "topk_weights": y["topk_weights"],
                 "topk_ids": (ids, [16, 2], tensors.pack(ids, tensors.values(y, "topk_ids")))}  # fmt: skip
        tensors.write("g", given)
        moe(*run, "g", "--output", "z", "--routing", "given")
        z = tensors.read("z")
        check(z["hidden_states"] == y["hidden_states"], f"{ids}: given routing gives another result")
        check(z["topk_ids"] == y["topk_ids"] and "router_logits" not in z, f"{ids}: {list(z)}")
    none = dict(given, topk_ids=("I64", [16, 2], tensors.pack("I64", [-1, 1 << 40] * 16)))
    tensors.write("g", none)
    moe(*run, "g", "--output", "z", "--routing", "given")
    check(not any(tensors.values(tensors.read("z"), "hidden_states")), "tokens without experts are not zero")


def test_bad_inputs():
    tiny()
    run = ["forward", "--model", "m", "--output", "y", "--device", "cpu", "--input", "a"]
    given = run + ["--routing", "given"]
    good = {"hidden_states": ("F32", [2, 64], bytes(512)), "topk_ids": ("I32", [2, 2], bytes(16)),
            "topk_weights": ("F32", [2, 2], bytes(16))}  # fmt: skip
    fails(4, "^moe: a: ", *run)
    os.mkdir("directory")
    fails(4, "^moe: directory: ", *run[:-1], "directory")
    for name, tensor, pattern in [
        ("hidden_states", None, "a: tensor 'hidden_states' is missing"),
        ("hidden_states", ("F32", [64], bytes(256)), "a: tensor 'hidden_states' has 1 dimensions, expected 2"),
        ("hidden_states", ("F32", [1, 2, 64], bytes(512)), "a: tensor 'hidden_states' has 3 dimensions"),
        ("hidden_states", ("F32", [2, 63], bytes(504)), "a: tensor 'hidden_states' has 63 columns.*hidden_size is 64"),
        ("hidden_states", ("I32", [2, 64], bytes(512)), "a: tensor 'hidden_states' is I32, expected BF16, F16 or F32"),
        ("topk_ids", None, "a: tensor 'topk_ids' is missing"),
        ("topk_ids", ("F32", [2, 2], bytes(16)), "a: tensor 'topk_ids' is F32, expected I32 or I64"),
        ("topk_ids", ("I32", [3, 2], bytes(24)), "a: tensor 'topk_ids' has 3 rows"),
        ("topk_ids", ("I32", [2, 3], bytes(24)), "a: tensor 'topk_weights' has 2 columns, but 'topk_ids' has 3"),
        ("topk_ids", ("I32", [2, 65], bytes(520)), "a: tensor 'topk_ids' has 65 columns, expected 1 to 64"),
        ("topk_weights", None, "a: tensor 'topk_weights' is missing"),
        ("topk_weights", ("BF16", [2, 2], bytes(8)), "a: tensor 'topk_weights' is BF16, expected F32"),
    ]:
        broken = {k: v for k, v in {**good, name: tensor}.items() if v}
        tensors.write("a", broken)
        fails(4, "^moe: " + pattern, *(given if name != "hidden_states" else run))
    with open("a", "wb") as f:
        f.write(b"not a tensor file")
    fails(4, "^moe: a: ", *run)
    check(not os.path.exists("y"), "a failed run left an output")


def test_bad_models():
    tiny()
    run = ["--output", "y", "--device", "cpu", "--input", "x.safetensors"]
    fails(4, "^moe: nowhere", "inspect", "--model", "nowhere")
    fails(4, "^moe: nowhere", "forward", "--model", "nowhere", *run)
    fails(4, "^moe: nowhere", "replay", "--model", "nowhere", "--session", "s")
    fails(4, "^moe: m/nothing", "replay", "--model", "m", "--session", "m/nothing")
    fails(4, "layer 0", "inspect", "--model", fixture("qwen3_moe-bf16"), "--layer", 0)
    fails(4, "layer 0", "forward", "--model", fixture("qwen3_moe-bf16"), "--layer", 0, *run)
    with open("config.json", "w") as f:
        json.dump({"model_type": "gpt_oss"}, f)
    fails(4, "^moe: config.json: 'model_type' is \"gpt_oss\"", "synth", "--config", "config.json", "--output", "n")
    check(not os.path.exists("n"), "a failed synth left a directory")


def test_malformed():
    if not args.malformed:
        return skipped.append("malformed files: no --malformed program")
    subprocess.run([args.malformed, "--write", "bad"], check=True, stdout=subprocess.DEVNULL)
    names, lines = sorted(os.listdir("bad")), {}
    check(len(names) >= 60, f"{len(names)} malformed checkpoints, expected at least 60")
    tensors.write("x", {"hidden_states": ("F32", [1, 64], bytes(256))})
    for name in names:
        model = os.path.join("bad", name)
        line = fails(4, "", "inspect", "--model", model, "--layer", 0)
        check(line == fails(4, "", "forward", "--model", model, "--layer", 0, "--input", "x", "--output", "y"),
              f"{name}: inspect and forward say different things")  # fmt: skip
        what = line.replace(name, "")
        check(what not in lines, f"{name} and {lines.get(what)} have the same message: {line.strip()}")
        lines[what] = name
    check(not os.path.exists("y"), "a failed run left an output")


def test_cannot():
    tiny()
    run = ["forward", "--model", "m", "--input", "x.safetensors", "--output", "y"]
    if have_gpu():
        skipped.append("missing GPU: there is one")
        fails(3, "^moe: ", *run, "--device", "cuda:1000")
    else:
        fails(3, "^moe: ", *run, "--device", "cuda")
        fails(3, "^moe: ", "replay", "--model", "m", "--session", "s", "--device", "cuda:0")
    fails(3, "^moe: path 'simple'", *run, "--device", "cpu", "--path", "simple")
    fails(3, "^moe: path 'decode'", *run, "--device", "cpu", "--path", "decode")
    check(not os.path.exists("y"), "a failed run left an output")


def test_closed_streams():
    """A warning that cannot be shown must not end up in the output, whose descriptor could have the number 2."""
    tiny()
    with open("m/config.json") as f:
        text = f.read()
    with open("m/config.json", "w") as f:
        f.write(text.replace("bfloat16", "float32"))
    run = ["forward", "--model", "m", "--input", "x.safetensors", "--device", "cpu", "--output"]
    check("config.json says f32" in moe(*run, "y")[1], "no warning of the other dtype")
    subprocess.run(["sh", "-c", 'exec "$@" <&- 2>&-', "sh", args.moe, *run, "z"], stdout=subprocess.DEVNULL, check=True)
    check(tensors.read("y") == tensors.read("z"), "with closed streams the output is another")
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", args.moe, "doctor"], stderr=subprocess.PIPE, text=True)
    check(done.returncode == 3 and done.stderr.startswith("moe: standard output: "), f"closed stdout: {done}")


def test_unwritable():
    """Missing and unwritable directories, devices as outputs, a full standard output."""
    tiny()
    run = ["forward", "--model", "m", "--input", "x.safetensors", "--device", "cpu", "--output"]
    synth = ["synth", "--like", "tiny-mixtral", "--output"]
    fails(3, "^moe: no/y: ", *run, "no/y")
    fails(3, "^moe: x.safetensors/y: ", *run, "x.safetensors/y")
    fails(3, "^moe: m: ", *run, "m")
    fails(3, "^moe: /dev/full: ", *run, "/dev/full")
    fails(3, "^moe: no/n: ", *synth, "no/n")
    fails(3, "^moe: x.safetensors: ", *synth, "x.safetensors")
    fails(3, "^moe: no/h: ", "synth", "--like", "tiny-mixtral", "--hidden-states", "no/h", "--tokens", 1)
    fails(3, "^moe: x.safetensors", *run[:-1], "--capture", "x.safetensors")
    with open("/dev/full", "w") as full:
        done = subprocess.run([args.moe, "doctor"], stdout=full, stderr=subprocess.PIPE, text=True)
    check(done.returncode == 3 and done.stderr.startswith("moe: standard output: "), f"full stdout: {done}")
    if os.geteuid() == 0:
        skipped.append("directory without permission: root may write anywhere")
    else:
        os.mkdir("closed", 0o555)
        fails(3, "^moe: closed/y: ", *run, "closed/y")
        fails(3, "^moe: closed/n: ", *synth, "closed/n")


def limit(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_full_disk():
    """A file size limit stands for a disk that fills up in the middle of a file; then a disk that is really full."""
    tiny()
    before = sorted(os.listdir())
    run = ["forward", "--model", "m", "--input", "x.safetensors", "--device", "cpu"]
    fails(3, "^moe: y: ", *run, "--output", "y", preexec_fn=limit(1024))
    fails(3, "^moe: n/model.safetensors: ", "synth", "--like", "tiny-mixtral", "--output", "n", preexec_fn=limit(4096))
    fails(3, "^moe: n/model-0000.-of-000..*: ", "synth", "--like", "tiny-mixtral", "--output", "n", "--hidden", 128,
          "--shard-size", 40000, preexec_fn=limit(20000))  # fmt: skip
    fails(3, "^moe: h: ", "synth", "--model", "m", "--hidden-states", "h", "--tokens", 64, preexec_fn=limit(4096))
    check(sorted(os.listdir()) == before, f"left behind: {os.listdir()}")

    moe(*run, "--output", "y", "--capture", "s")
    fails(3, "^moe: s", *run, "--capture", "s", preexec_fn=limit(1024))
    check(report("replay", "--model", "m", "--session", "s", "--verify")["verify"]["batches"] == 1, "a session grew")

    os.mkdir("disk")
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "disk"],
                                           capture_output=True).returncode != 0:  # fmt: skip
        return skipped.append("full disk: no permission to mount one")
    try:
        fails(3, "^moe: disk/n: No space left", "synth", "--like", "tiny-mixtral", "--output", "disk/n")
        fails(3, "^moe: disk/h: ", "synth", "--model", "m", "--hidden-states", "disk/h", "--tokens", 4096)
        check(os.listdir("disk") == [], f"left behind: {os.listdir('disk')}")
    finally:
        subprocess.run(["umount", "disk"], check=True)


def start(*words):
    return subprocess.Popen([args.moe, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def check_checkpoint(name):
    """Files are whole, and config.json stands only with all the others."""
    files = os.listdir(name) if os.path.isdir(name) else []
    shards = [f for f in files if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", f)]
    for shard in shards:
        tensors.read(os.path.join(name, shard))
    if "config.json" in files:
        with open(os.path.join(name, "model.safetensors.index.json")) as f:
            check(set(json.load(f)["weight_map"].values()) == set(shards), f"config.json without all shards: {files}")


def test_killed():
    """SIGKILL and SIGTERM after the k-th file of a checkpoint has appeared."""
    make = ["synth", "--like", "tiny-mixtral", "--hidden", 512, "--intermediate", 1024, "--layers", 4, "--shard-size",
            "5MB", "--output"]  # fmt: skip
    for number in (signal.SIGKILL, signal.SIGTERM):
        for k in (0, 1, 3, 8):
            name = f"n{number}-{k}"
            child = start(*make, name)
            while child.poll() is None and (not os.path.isdir(name) or len(os.listdir(name)) <= k):
                time.sleep(0.0005)
            child.send_signal(number)
            child.wait()
            check_checkpoint(name)
            if child.returncode == 0:
                continue
            check(child.returncode == -number, f"exit code {child.returncode} after signal {number}")
            check(not os.path.exists(os.path.join(name, "config.json")) or number == signal.SIGKILL, "half a checkpoint")
            check(number == signal.SIGKILL or not os.path.exists(name), f"SIGTERM left {name}")
            moe(*make, name, "--force")
            check_checkpoint(name)
            moe("inspect", "--model", name, "--layer", 3)

    tiny("m")
    for _ in range(10):
        child = start("forward", "--model", "m", "--input", "x.safetensors", "--output", "y", "--capture", "s",
                      "--device", "cpu")  # fmt: skip
        child.kill()
        child.wait()
        if os.path.exists("y"):
            tensors.read("y")
    moe("forward", "--model", "m", "--input", "x.safetensors", "--capture", "s", "--device", "cpu")
    moe("replay", "--model", "m", "--session", "s", "--verify", "--device", "cpu")


def batches(result):
    return [b["index"] for b in result["batches"]]


def test_session():
    session()
    run = ["replay", "--model", "m", "--session", "s", "--device", "cpu"]
    result = report(*run, "--verify")
    check(batches(result) == [0, 1, 2, 3], f"batches {batches(result)}")
    check({p["phase"]: p["tokens"] for p in result["phases"]} == {"prefill": 32, "decode": 2}, f"{result['phases']}")
    check(result["verify"]["worst_error"] == 0, "the same path gave other bits")
    check(batches(report(*run, "--layer", 1)) == [2, 3], "--layer 1")
    report(*run, "--verify", "--routing", "new", "--path", "reference")
    fails(2, "--layer is 2, but m has layers 0 to 1", *run, "--layer", 2)

    with open("s/session.jsonl", "rb") as f:
        text = f.read()
    for cut in (1, 20, len(text.splitlines(True)[-1]) - 1):
        with open("s/session.jsonl", "wb") as f:
            f.write(text[:-cut])
        check(batches(report(*run, "--verify")) == [0, 1, 2], f"session cut by {cut} bytes")
    moe("forward", "--model", "m", "--input", "x1.safetensors", "--capture", "s", "--phase", "warmup", "--device", "cpu")
    result = report(*run, "--verify")
    check(batches(result) == [0, 1, 2, 3] and result["batches"][0]["layer"] == 0, "appending after a cut")
    check({p["phase"] for p in result["phases"]} == {"prefill", "decode", "warmup"}, "phase words")


def rewrite(path, name, change):
    """Changes one tensor of a file through a function on its list of values."""
    file = tensors.read(path)
    dtype, shape, _ = file[name]
    file[name] = (dtype, shape, tensors.pack(dtype, change(tensors.values(file, name))))
    tensors.write(path, file)


def batch_file(index):
    with open("s/session.jsonl") as f:
        return os.path.join("s", json.loads(f.read().splitlines()[index])["file"])


def test_mismatch():
    session()
    run = ["replay", "--model", "m", "--session", "s", "--device", "cpu"]
    keep = tensors.read(batch_file(2))

    def other_output(values):
        values[5 * 64 + 17] += 8
        return values

    rewrite(batch_file(2), "output", other_output)
    moe(*run)
    fails(1, "batch 2, layer 1: token 5, column 17: got .*, recorded .*", *run, "--verify")
    moe(*run, "--verify", "--tolerance", 1e9)
    moe(*run, "--verify", "--layer", 0)
    tensors.write(batch_file(2), {k: v for k, v in keep.items() if k != "output"})
    check(report(*run, "--verify")["verify"] | {"worst_error": 0} ==
          {"batches": 3, "without_output": 1, "tied_tokens": 0, "worst_error": 0}, "a batch without output")  # fmt: skip
    os.mkdir("empty")
    open("empty/session.jsonl", "w").close()
    fails(4, "no batch with a recorded output", "replay", "--model", "m", "--session", "empty", "--verify")

    tensors.write(batch_file(2), keep)
    logits = tensors.values(keep, "router_logits")
    token = max(range(16), key=lambda t: max(logits[4 * t : 4 * t + 4]) - min(logits[4 * t : 4 * t + 4]))
    worst = min(range(4), key=lambda e: logits[4 * token + e])

    def other_expert(values):
        values[2 * token] = worst
        return values

    rewrite(batch_file(2), "topk_ids", other_expert)
    fails(1, f"batch 2, layer 1: token {token}, slot 0: chose expert .*, recorded {worst}", *run, "--verify",
          "--routing", "new")  # fmt: skip
    fails(1, f"batch 2, layer 1: token {token}, column", *run, "--verify")


def test_session_of_another_model():
    session()
    moe("synth", "--like", "tiny-mixtral", "--output", "wide", "--hidden", 128, "--layers", 2)
    moe("synth", "--like", "tiny-mixtral", "--output", "short")
    fails(4, "s: batch 0: hidden_states has 64 columns, but layer 0 of wide has hidden_size 128", "replay", "--model",
          "wide", "--session", "s")  # fmt: skip
    fails(4, "s: batch 2: layer 1, but short has layers 0 to 0", "replay", "--model", "short", "--session", "s")


def shard_bytes(name):
    files = sorted(f for f in os.listdir(name) if f.endswith(".safetensors"))
    return {f: open(os.path.join(name, f), "rb").read() for f in files}


def test_synth():
    tiny("a", "--threads", 1, "--layers", 2)
    tiny("b", "--threads", 3, "--layers", 2)
    tiny("c", "--seed", 2, "--layers", 2)
    check(shard_bytes("a") == shard_bytes("b"), "the number of threads changes the weights")
    check(shard_bytes("a") != shard_bytes("c"), "the seed does not change the weights")
    names = set(tensors.read("a/model.safetensors"))
    expected = {f"model.layers.{l}.block_sparse_moe.experts.{e}.{w}.weight" for l in range(2) for e in range(4)
                for w in ("w1", "w2", "w3")} | {f"model.layers.{l}.block_sparse_moe.gate.weight" for l in range(2)}  # fmt: skip
    check(names == expected, f"tensor names: {sorted(names ^ expected)}")
    for dtype, kind in (("f32", "F32"), ("f16", "F16"), ("bf16", "BF16")):
        moe("synth", "--like", "tiny-mixtral", "--output", dtype, "--dtype", dtype)
        for name, tensor in tensors.read(dtype + "/model.safetensors").items():
            values = tensors.unpack(kind, tensor[2])
            deviation = math.sqrt(sum(v * v for v in values) / len(values)) * math.sqrt(tensor[1][1])
            check(tensor[0] == kind and 0.8 < deviation < 1.2, f"{dtype}: {name} deviates by {deviation}")

    moe("synth", "--like", "tiny-qwen3-moe", "--output", "q", "--shard-size", "50KB", "--layers", 3)
    files = shard_bytes("q")
    check(len(files) > 2 and max(map(len, files.values())) < 60000, f"shards {[len(f) for f in files.values()]}")
    check_checkpoint("q")
    check(report("inspect", "--model", "q")["layers"]["whole"] == [0, 1, 2], "qwen3_moe is not whole")
    moe("synth", "--like", "tiny-mixtral", "--output", "q", "--force")
    check(sorted(os.listdir("q")) == ["config.json", "model.safetensors"], f"--force left {os.listdir('q')}")
    check(report("inspect", "--model", "q")["model_type"] == "mixtral", "--force kept the old config")

    moe("synth", "--config", fixture("olmoe-f32") + "/config.json", "--output", "o", "--experts", 3, "--top-k", 1)
    shape = report("inspect", "--model", "o")["layer"]
    check((shape["num_experts"], shape["top_k"], shape["dtype"]) == (3, 1, "f32"), f"{shape}")
    moe("synth", "--model", fixture("olmoe-f32"), "--hidden-states", "h", "--tokens", 3)
    dtype, size, data = tensors.read("h")["hidden_states"]
    check((dtype, size[0]) == ("F32", 3) and len(set(tensors.unpack(dtype, data))) > 100, f"hidden states {size}")


def test_partial_download():
    """With one shard missing the other layers can be used, and the report says which."""
    moe("synth", "--like", "tiny-mixtral", "--output", "m", "--layers", 3, "--shard-size", 200000)
    os.unlink("m/model-00002-of-00003.safetensors")
    layers = report("inspect", "--model", "m")["layers"]
    check(layers["incomplete"] and layers["whole"], f"{layers}")
    check("model-00002-of-00003.safetensors" in layers["why_incomplete"], f"{layers}")
    moe("inspect", "--model", "m", "--layer", layers["whole"][0])
    fails(4, "model-00002-of-00003.safetensors", "inspect", "--model", "m", "--layer", layers["incomplete"][0])
    # The shards alone, without an index.
    os.unlink("m/model.safetensors.index.json")
    loose = report("inspect", "--model", "m")["layers"]
    check(loose["whole"] == layers["whole"] and loose["incomplete"] == layers["incomplete"], f"{loose}")
    moe("synth", "--model", "m", "--hidden-states", "x", "--tokens", 2)
    moe("forward", "--model", "m", "--layer", layers["whole"][0], "--input", "x", "--output", "y")


def test_json():
    tiny()
    result = report("forward", "--model", "m", "--input", "x.safetensors", "--output", "y", "--device", "cpu")
    check((result["tokens"], result["path"], result["layer"]) == (16, "cpu", 0) and result["seconds"] > 0, f"{result}")
    check(result["weight_bytes"] <= result["load"]["bytes"], f"{result}")
    names = [p["name"] for p in report("doctor")["paths"]]
    check(names == [p["name"] for p in report("inspect", "--model", "m")["paths"]] and "reference" in names, f"{names}")
    check(report("synth", "--like", "tiny-mixtral", "--output", "n")["files"] == 1, "synth --json")


def test_layouts():
    """Every path that can run here gets the layer in a layout that it reads."""
    tiny()
    result = report("inspect", "--model", "m")
    layouts = {p["name"]: p["layouts"] for p in result["paths"]}
    check(layouts["simple"] == ["row-major"] and layouts["prefill"] == ["row-major", "packed"], f"{layouts}")
    loaded = (result["layer"]["layout"], result["layer"]["layout_device"])
    check(loaded == (("packed", "cuda:0") if have_gpu() else ("row-major", "cpu")), f"{loaded}")
    for path in result["paths"]:
        if path["available"]:
            run = report("forward", "--model", "m", "--input", "x.safetensors", "--output", "y", "--device",
                         path["device"], "--path", path["name"])  # fmt: skip
            check(run["path"] == path["name"], f"{run}")


def test_bench():
    """Times and their ratios to the floor of one run, in three formats; the lists of what to time."""
    run = ["bench", "--shape", "64,96,5,2", "--device", "cpu", "--reps", 3, "--seconds", 1]
    result = report(*run, "--tokens", "7,2", "--paths", "auto,cpu,prefill", "--stages")
    check([p["tokens"] for p in result["points"]] == [2, 7], f"{result}")
    check([u["path"] for u in result["unavailable"]] == ["prefill"], f"{result}")
    for point in result["points"]:
        floor = max(point[c]["median_seconds"] for c in ("read", "dense") if c in point)
        check(point["floor_seconds"] == floor and point["experts_touched"] <= 5, f"{point}")
        check(point["flops"] == point["tokens"] * (6 * 2 * 64 * 96 + 2 * 64 * 5), f"{point}")
        parts = [(r["path"], r["part"]) for r in point["results"]]
        check(parts == [(p, q) for p in ("auto", "cpu") for q in ("layer", "route", "experts")], f"{parts}")
        for entry in point["results"]:
            check((entry["ran"], entry["layout"]) == ("cpu", "row-major") and "config" not in entry, f"{entry}")
            check(("why" in entry) == (entry["path"] == "auto"), f"{entry}")
            check(("time_over_floor" in entry) == (entry["part"] != "route"), f"{entry}")
            if entry["part"] == "route":
                continue
            over = entry["time"]["median_seconds"] / floor
            check(abs(entry["time_over_floor"] / over - 1) < 1e-9, f"{entry}")
            check(abs(entry["share_of_floor"] * over - 1) < 1e-9, f"{entry}")
            rate = point["flops"] / entry["time"]["median_seconds"] / 1e12
            check(abs(entry["tflop_per_s"] / rate - 1) < 1e-9, f"{entry}")

    lines = list(csv.DictReader(moe(*run, "--tokens", 3, "--paths", "cpu,reference", "--csv")[0].splitlines()))
    check([line["path"] for line in lines] == ["reference", "cpu"], f"{lines}")
    for line in lines:
        over = float(line["seconds"]) / max(float(line["read_seconds"]), float(line["dense_seconds"] or 0))
        check(abs(float(line["over_floor"]) / over - 1) < 1e-3 and None not in line, f"{line}")
        plain = {"layout": "row-major", "config": "", "max_sms": "0", "of_all_sms": ""}
        check(line | plain == line, f"{line}")
    out, _ = moe(*run, "--tokens", 3, "--paths", "auto,cpu", "--layouts", "row-major")
    check(re.search(r"(?m)^ +3  auto > cpu +\S+ \S+ .* \d+\.\d{3}  \S.*\n +3  cpu +\S+ \S+ .* \d+\.\d{3}$", out), out)

    fails(2, "--paths has 'prefil', .*did you mean 'prefill'", *run, "--paths", "cpu,prefil")
    fails(2, "--layouts has 'auto', expected packed or row-major", *run, "--layouts", "packed,auto")
    fails(2, "--configs has 'all', which no path of --paths has", *run, "--paths", "cpu", "--configs", "all")
    fails(2, "--max-sms has '0', expected an integer from 1", *run, "--max-sms", "8,0")
    fails(2, "--tokens has '1x'", *run, "--tokens", "1x")
    fails(2, "--like 'olmo' is no shape.*, did you mean 'olmoe'", "bench", "--like", "olmo")
    fails(2, "--shape is '64,96,5'", "bench", "--shape", "64,96,5")
    fails(2, "--shape is '64,96,5,6'", "bench", "--shape", "64,96,5,6")
    fails(3, "--max-sms is for a GPU", *run, "--max-sms", 8)
    fails(3, "packed weights: path 'prefill'", *run, "--layouts", "packed")
    # Two paths that have configurations, where the build has them: what is missing then is the device.
    both = [*run, "--paths", "decode,prefill", "--configs", "all", "--layouts", "row-major"]
    if report("doctor")["build"]["cuda"]:
        fails(3, "none of the paths asked for", *both, "--json")
    else:
        fails(2, "--configs has 'all', which no path of --paths has", *both)


def test_bench_decode():
    """A layer alone and in a chain of 32, for every routing; the chain's layers touch as many experts as the first."""
    run = ["bench", "--decode", "--shape", "64,96,5,2", "--device", "cpu", "--reps", 2, "--seconds", 1]
    result = report(*run, "--tokens", 3, "--paths", "auto,reference")
    check(result["chain"] == {"layers": 32, "copies": 32} and "routing" not in result, f"{result}")
    points = [(p["routing"], p["tokens"]) for p in result["points"]]
    check(points == [("uniform", 3), ("zipf", 3), ("single", 3)], f"{points}")
    for point in result["points"]:
        touched, floor = point["experts_touched"], point["floor_seconds"]
        check(touched == 2 if point["routing"] == "single" else 2 <= touched <= 5, f"{point}")
        # Of logits that are equal the lowest id goes first, which a turned gate changes.
        check(abs(point["chain_experts_touched"] - touched) < 1, f"{point}")
        check(floor == max(point[c]["median_seconds"] for c in ("read", "dense") if c in point), f"{point}")
        runs = [(r["path"], r["ran"], r["layout"], "note" in r) for r in point["results"]]
        check(runs == [("auto", "cpu", "row-major", True), ("reference", "reference", "row-major", False)], f"{runs}")
        for entry in point["results"]:
            alone, chain = entry["alone"], entry["chain"]
            check(alone["samples"] == chain["samples"] == 2 and not entry["graph"], f"{entry}")
            check(0 < alone["median_seconds"] <= alone["p99_seconds"], f"{entry}")
            check(0 < chain["median_seconds"] <= chain["p99_seconds"], f"{entry}")
            shares = (entry["alone_share_of_floor"] * alone["median_seconds"] / floor,
                      entry["chain_share_of_floor"] * chain["median_seconds"] / point["chain_floor_seconds"],
                      entry["chain_over_alone"] * alone["median_seconds"] / chain["median_seconds"])  # fmt: skip
            check(all(abs(s - 1) < 1e-9 for s in shares), f"{entry}")

    # Many tokens take one thread so long that a layer's time in the chain, a 32nd of it, cannot be mistaken for it.
    many = ["--routing", "single", "--tokens", 64, "--paths", "reference", "--threads", 1]
    lines = list(csv.DictReader(moe(*run, *many, "--csv")[0].splitlines()))
    check(len(lines) == 1 and None not in lines[0], f"{lines}")
    line = lines[0]
    told = {"routing": "single", "tokens": "64", "experts": "2", "chain_experts": "2.0000", "layout": "row-major",
            "config": "", "max_sms": "0", "graph": "0"}  # fmt: skip
    check(line | told == line and 0.1 < float(line["chain_over_alone"]) < 10, f"{line}")

    tiny()
    model = ["bench", "--decode", "--model", "m", "--device", "cpu", "--reps", 1]
    out, err = moe(*model, "--tokens", 2)
    check(re.search(r"(?m)^model routing, .*\ntokens .*\n +2  auto > cpu +[234]( +\d+\.\d){7} +\d+\.\d{4}  \S", out), out)
    check("32 layers that run one after the other, on 32 copies" in out and not err, out)

    fails(2, "--stages is not for --decode", *run, "--stages")
    fails(2, "--load is not for --decode", "bench", "--decode", "--load", "--model", "m")
    fails(2, "--routing is the checkpoint's own", *model, "--routing", "zipf")
    fails(3, "none of the paths asked for", *run, "--paths", "prefill", "--json")


def test_tune():
    """Writes a table, which auto then chooses by; keeps the entries of other layers; refuses what is no table for it."""
    tiny()
    tune = ["tune", "--device", "cpu", "--seconds", 0.2]
    run = ["forward", "--model", "m", "--input", "x.safetensors", "--output", "y", "--device", "cpu"]
    table = {**os.environ, "MOE_TUNED": "moe-tuned.json"}
    formula = "cpu: the fastest path on the CPU"
    check(report(*run)["path_reason"] == formula, "a table that is not there yet")

    result = report(*tune, "--shape", "64,96,5,2", "--tokens", "7,2,7", "--dtype", "f32")
    check([p["tokens"] for p in result["points"]] == [2, 7] and result["points_written"] == 1, f"{result}")
    check((result["file"], result["layout"], result["layer"]["dtype"]) == ("moe-tuned.json", "row-major", "f32"),
          f"{result}")  # fmt: skip
    for point in result["points"]:
        check(point["formula"] == formula and point["chosen"] == {"path": "cpu"} and point["gain"] == 0, f"{point}")
        check([c["path"] for c in point["candidates"]] == ["cpu"], f"{point}")
        check(all(c["samples"] >= 3 and c["median_seconds"] > 0 for c in point["candidates"]), f"{point}")

    def written():
        with open("moe-tuned.json") as f:
            return json.load(f)

    device = report("doctor")["cpu"]
    first = {"hidden_size": 64, "intermediate_size": 96, "num_experts": 5, "top_k": 2, "dtype": "f32",
             "layout": "row-major", "points": [{"tokens": 2, "path": "cpu"}]}  # fmt: skip
    check(written() == {"device": {"name": device["name"], "compute_capability": 0, "cores": device["threads"]},
                        "entries": [first]}, f"{written()}")  # fmt: skip
    # The model's shape; a table that is in use is not what it is measured against.
    out, err = moe(*tune, "--model", "m", "--tokens", 16, env=table)
    check(re.search(r"(?m)^tokens +cpu  chosen\n +16 +\S+ \S+  cpu, the formula's choice$", out), out)
    check(re.search(r"(?m)^moe-tuned.json: 1 point for this layer; .*MOE_TUNED=moe-tuned.json$", out) and not err, out)
    second = {"hidden_size": 64, "intermediate_size": 128, "num_experts": 4, "top_k": 2, "dtype": "bf16",
              "layout": "row-major", "points": [{"tokens": 16, "path": "cpu"}]}  # fmt: skip
    check(written()["entries"] == [first, second], f"{written()}")
    moe(*tune, "--shape", "64,96,5,2", "--tokens", 3, "--dtype", "f32")
    first["points"][0]["tokens"] = 3
    check(written()["entries"] == [first, second], f"{written()}")

    tuned = "cpu: tuned for 16 tokens and more in moe-tuned.json"
    check(report(*run)["path_reason"] == formula, "a table that nothing names")
    check(report(*run, env=table)["path_reason"] == tuned, "MOE_TUNED")
    check("path     " + tuned + "\n" in moe(*run, env=table)[0], "MOE_TUNED: not printed")
    other = written()
    other["entries"][1]["points"] = [{"tokens": 2, "path": "reference"}, {"tokens": 17, "path": "cpu"}]
    with open("moe-tuned.json", "w") as f:
        json.dump(other, f)
    result = report(*run, env=table)
    check((result["path"], result["path_reason"]) == ("reference", tuned.replace("cpu", "reference").replace("16", "2")),
          f"{result}")  # fmt: skip
    check(report(*run, "--path", "cpu", env=table)["path_reason"] == "cpu: asked for by name", "by name")

    other["device"]["cores"] += 1
    with open("moe-tuned.json", "w") as f:
        json.dump(other, f)
    out, err = moe(*run, env=table)
    check(formula in out and re.fullmatch(r"moe: moe-tuned.json: was measured on .*: the table is not used\n", err), err)
    fails(4, "^moe: moe-tuned.json: was measured on .*: give another --output", *tune, "--shape", "64,96,5,2")
    other["entries"][0]["points"][0]["path"] = "fast"
    with open("moe-tuned.json", "w") as f:
        json.dump(other, f)
    bad = "^moe: moe-tuned.json: 'entries\\[0\\].points\\[0\\].path' is \"fast\", expected one of"
    fails(4, bad, *run, env=table)
    fails(4, bad, *tune, "--shape", "64,96,5,2")
    fails(4, "^moe: none: cannot open", *run, env={**os.environ, "MOE_TUNED": "none"})
    moe("doctor", env=table)

    fails(3, "^moe: no/t: ", *tune, "--shape", "64,96,5,2", "--output", "no/t")
    fails(3, "^moe: m: is a directory", *tune, "--shape", "64,96,5,2", "--output", "m")
    fails(3, "^moe: ", *tune, "--device", "cuda:1000")
    fails(2, "tune: --tokens has '0'", *tune, "--tokens", 0)
    fails(2, "tune: --like 'olmo' is no shape.*, did you mean 'olmoe'", *tune, "--like", "olmo", "--output", "t")
    fails(2, "tune: --model, --like and --shape exclude each other", *tune, "--like", "olmoe", "--model", "m")
    fails(2, "tune: --dtype is the checkpoint's own", *tune, "--dtype", "f32", "--model", "m")
    fails(2, "tune: --layer needs --model", *tune, "--layer", 0)
    check(not os.path.exists("t"), "a failed run left a table")


def test_torch_compare():
    """Without torch, a GPU or the library it says so in one line."""
    script = os.path.join(HERE, "..", "..", "tools", "ctypes", "torch_compare.py")
    done = subprocess.run([sys.executable, "-B", script, "./none.so"], capture_output=True, text=True)
    lines = done.stderr.splitlines()
    check(done.returncode == 3 and len(lines) == 1 and lines[0].startswith("torch_compare: "), f"{done}")


def test_bench_load():
    """Loading is timed against a plain read of the same bytes: of the layer asked for, from all its shards."""
    moe("synth", "--like", "tiny-mixtral", "--output", "m", "--layers", 2, "--shard-size", 100000)
    load = ["bench", "--load", "--model", "m", "--device", "cpu"]
    whole = report("inspect", "--model", "m", "--layer", 1)["layer"]["bytes"]
    result = report(*load, "--layer", 1, "--reps", 3)
    check(result["workload"] == "m layer 1" and result["layer"]["num_experts"] == 4, f"{result}")
    check(result["bytes"] == whole, f"{result}")
    plain, loaded = result["plain_read"], result["load"]
    check(plain["samples"] == loaded["samples"] == 3, f"{result}")
    share = plain["median_seconds"] / loaded["median_seconds"]
    check(share > 0 and abs(result["share_of_plain_read"] / share - 1) < 1e-9, f"{result}")
    rate = result["bytes"] / loaded["median_seconds"] / 1e9
    check(abs(result["load_gb_per_s"] / rate - 1) < 1e-9, f"{result}")
    out, err = moe(*load)
    check(re.search(r"(?m)^plain read +\S+ \S+ +\S+\nload +\S+ \S+ +\S+ +\S+ % of a plain read$", out), out)
    check(err == "", err)
    fails(2, "--load needs --model", "bench", "--load")
    fails(2, "--load needs --model", "bench", "--load", "--like", "olmoe")
    for words in (["--tokens", 1], ["--paths", "cpu"], ["--layouts", "packed"], ["--configs", 1], ["--max-sms", 1],
                  ["--stages"], ["--seconds", 1], ["--csv"]):  # fmt: skip
        fails(2, "are not for --load", *load, *words)
    fails(2, "--layer is 2, but m has layers 0 to 1", *load, "--layer", 2)
    os.unlink("m/model-00002-of-00004.safetensors")
    fails(4, "model-00002-of-00004.safetensors", *load)


def main():
    global args
    parser = argparse.ArgumentParser()
    parser.add_argument("moe")
    parser.add_argument("--fixtures", default=os.path.join(HERE, "..", "fixtures"))
    parser.add_argument("--malformed")
    parser.add_argument("--update", action="store_true")
    parser.add_argument("tests", nargs="*")
    args = parser.parse_args()
    for name in ("moe", "fixtures", "malformed"):
        if getattr(args, name):
            setattr(args, name, os.path.abspath(getattr(args, name)))

    failed, home = 0, os.getcwd()
    for name, test in [(n, f) for n, f in globals().items() if n.startswith("test_")]:
        if args.tests and name not in args.tests:
            continue
        directory = tempfile.mkdtemp(prefix="moe-cli-")
        os.chdir(directory)
        try:
            test()
            print(f"ok    {name}")
        except Exception as error:  # a broken command may surface as any of them; the other tests still run
            failed += 1
            print(f"FAIL  {name}: {type(error).__name__}: {error}")
        finally:
            os.chdir(home)
            shutil.rmtree(directory)
        sys.stdout.flush()
    for reason in skipped:
        print(f"skip  {reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
