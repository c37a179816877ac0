"""Campaigns against the parsers that read what strangers made: `make fuzz SECONDS=60 PARSERS="tuf tar"`.

    fuzz.py [--seconds N] [--engine auto|atheris|own] [--out DIR] [PARSER …]
    fuzz.py --replay FILE PARSER

Does: run each parser in a child on damaged valid files for so long, nicely; say how many runs that were and what came
out that is no SkerryError; shrink each such input and write it down.
Leaves out: which parsers there are (untrusted), how files are damaged (mutate).

Exit status: 0 nothing found, 1 something, 2 the command is wrong.

With atheris, which `make fuzz` installs beside the environment, new inputs follow the coverage of our code and of the
libraries that parse for it; otherwise chance alone makes them. A run is a finding, too, if it takes longer than
SLOW_S or the process outgrows MAX_MEMORY_MB.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT)]

SLOW_S = 10
MAX_MEMORY_MB = 2048
MAX_INPUT_BYTES = 1 << 14
SHRINK_S = 10
STATED_S = 1.0

# Whose branches count as something new.
_INSTRUMENTED = (
    "store",
    "skerry",
    "agent.triton",
    "agent.cli.manifestfile",
    "agent.yamltree",
    "providers",
    "tuf",
    "yaml",
)


class Runs:
    """One parser's campaign: counts, and keeps one input of every kind of failure.

    Args:
        parser: see untrusted.Parser.
        out: where inputs and counts are written.
        seed: of all chance.
    """

    def __init__(self, parser, out, seed):
        self.parser = parser
        self.out = out
        self.chance = random.Random(seed)
        self.count = self.accepted = 0
        self.slowest_s = 0.0
        self.findings = {}
        self._stated = time.monotonic()

    def one(self, data):
        """Run the parser once."""
        began = time.perf_counter()
        kind = self.kind(data)
        took_s = time.perf_counter() - began
        self.count += 1
        self.accepted += kind == ""
        self.slowest_s = max(self.slowest_s, took_s)
        if kind not in {"", None} and kind not in self.findings:
            path = self.out / f"crash-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
            path.write_bytes(data)
            self.findings[kind] = str(path)
            path.write_bytes(self._shrunk(data, kind))
        if time.monotonic() - self._stated > STATED_S:
            self.state()

    def kind(self, data):
        """What became of an input: "" for a result, None for a refusal, else what was raised, and where."""
        from skerry.errors import SkerryError

        try:
            self.parser.run(data)
        except SkerryError:
            return None
        except BaseException as error:  # a panic of a native library is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}"
        return ""

    def damaged(self, data=None):
        """A valid input, or `data`, with something wrong."""
        import mutate

        corpus = self.parser.corpus
        return mutate.damaged(
            self.chance.choice(corpus) if data is None else data, self.chance, corpus, MAX_INPUT_BYTES
        )

    def state(self):
        """Write down how far this is; a killed child leaves its last word."""
        self._stated = time.monotonic()
        words = {
            "runs": self.count,
            "accepted": self.accepted,
            "slowest_s": round(self.slowest_s, 3),
            "memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
            "findings": self.findings,
        }
        new = self.out / "state.new"
        new.write_text(json.dumps(words))
        new.replace(self.out / "state.json")

    def _shrunk(self, data, kind):
        """A shorter input that fails in the same way, found in SHRINK_S seconds."""
        until = time.monotonic() + SHRINK_S
        size = len(data) // 2
        while size:
            at = 0
            while at < len(data) and time.monotonic() < until:
                shorter = data[:at] + data[at + size :]
                if self.kind(shorter) == kind:
                    data = shorter
                else:
                    at += size
            size //= 2
        return data


def campaign(name, seconds, engine, out, seed):
    """The child: never returns."""
    warnings.simplefilter("error")
    os.nice(15)
    if engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=list(_INSTRUMENTED)):
            import untrusted
    else:
        import untrusted
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:  # noqa: S108
        runs = Runs(untrusted.parsers(Path(folder), [name])[name], out, seed)
        for data in runs.parser.corpus:
            assert runs.kind(data) == "", f"{name}: the corpus has an input that is refused"
        if engine == "atheris":
            _guided(runs, seconds, out, seed)
        limit = (MAX_MEMORY_MB << 20,) * 2
        resource.setrlimit(resource.RLIMIT_AS, limit)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            faulthandler.dump_traceback_later(SLOW_S, exit=True)
            runs.one(runs.damaged())
        faulthandler.cancel_dump_traceback_later()
        runs.state()


def _guided(runs, seconds, out, seed):
    import atheris

    def mutator(data, limit, chance_seed):
        # Half of the damage is ours, which knows JSON and numbers; libFuzzer's own knows what comparisons looked for.
        runs.chance.seed(chance_seed)
        changed = runs.damaged(data) if chance_seed & 1 else atheris.Mutate(data, limit)
        return changed[:limit]

    found = out / "corpus"
    found.mkdir(exist_ok=True)
    for number, data in enumerate(runs.parser.corpus):
        (found / f"valid{number}").write_bytes(data)
    options = {
        "max_total_time": int(seconds),
        "max_len": MAX_INPUT_BYTES,
        "timeout": SLOW_S,
        "rss_limit_mb": MAX_MEMORY_MB,
        "seed": seed,
        "verbosity": 0,
        "print_final_stats": 0,
    }
    flags = [f"-{key}={value}" for key, value in options.items()]
    atheris.Setup(
        [sys.argv[0], *flags, f"-artifact_prefix={out}/", str(found)], runs.one, custom_mutator=mutator
    )
    atheris.Fuzz()


def main(arguments):
    """See the module."""
    parser = argparse.ArgumentParser(prog="fuzz.py")
    parser.add_argument("parsers", nargs="*", metavar="PARSER")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--engine", choices=["auto", "atheris", "own"], default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / ".fuzz")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        campaign(options.parsers[0], options.seconds, options.engine, options.out, options.seed)
        return 0
    import untrusted  # in the child, atheris has to see it being imported

    wrong = set(options.parsers) - set(untrusted.NAMES)
    if wrong or (options.replay and len(options.parsers) != 1):
        parser.error(
            f"expected parsers among {', '.join(untrusted.NAMES)}, got {', '.join(options.parsers) or 'none'}"
        )
    if options.engine == "auto":
        options.engine = "atheris" if importlib.util.find_spec("atheris") else "own"
    if options.replay:
        with tempfile.TemporaryDirectory() as folder:
            print(
                untrusted.parsers(Path(folder), options.parsers)[options.parsers[0]].run(
                    options.replay.read_bytes()
                )
            )
        return 0
    found = [_watched(name, options) for name in options.parsers or untrusted.NAMES]
    return int(any(found))


def _watched(name, options):
    """Run one campaign in a child; whether it found anything."""
    out = options.out / name
    out.mkdir(parents=True, exist_ok=True)
    for old in (*out.glob("state.*"), *out.glob("crash-*"), *out.glob("timeout-*"), *out.glob("oom-*")):
        old.unlink()
    command = [
        sys.executable,
        __file__,
        "--child",
        "--seconds",
        str(options.seconds),
        "--engine",
        options.engine,
    ]
    command += ["--out", str(out), "--seed", str(options.seed), name]
    began = time.monotonic()
    with (out / "log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=log, check=False)
    took_s = time.monotonic() - began
    try:
        state = json.loads((out / "state.json").read_bytes())
    except FileNotFoundError:
        state = {"runs": 0, "accepted": 0, "slowest_s": 0, "memory_mb": 0, "findings": {}}
    runs = state["runs"]
    print(
        f"{name:8} {options.engine}: {runs} runs in {took_s:.0f} s, {runs / took_s:.0f}/s, "
        f"{state['accepted']} accepted, slowest {state['slowest_s']} s, {state['memory_mb']} MB"
    )
    findings = dict(state["findings"])
    findings |= {f"{path.name.partition('-')[0]} in one run": str(path) for path in out.glob("[to]*-*")}
    if done.returncode and not findings:
        findings[f"ended with status {done.returncode}"] = str(out / "log")
    for kind, path in findings.items():
        print(f"         {kind}: {path}")
        print(f"         again: {Path(sys.executable).name} tests/fuzz/fuzz.py --replay {path} {name}")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
