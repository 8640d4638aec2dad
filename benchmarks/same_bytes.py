"""Whether a change left the results of the `ci` profile as they were: `faces`, `conversations`, and each stage's model.

    python benchmarks/same_bytes.py              # runs the profile in a home of its own, prints the digests
    python benchmarks/same_bytes.py --is FILE    # and compares them with those printed before the change

A refactor keeps them; exit code 1 names the first step whose bytes differ. Two to three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
STEPS = ("ingest", "annotate", "reformat", "align", "instruct", "specialize")


def digests_of_a_run() -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        places = ["--set", f"storage.home={folder}/home", "--set", f"storage.runs={folder}/runs"]
        command = [sys.executable, "pipeline.py", "run", "--profile", "ci", *places, "--json"]
        try:
            done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True, check=True)
        finally:
            down = [sys.executable, "-m", "facemllm", "services", "down", "--profile", "ci", *places]
            subprocess.run(down, cwd=PROJECT, check=True, stdout=sys.stderr)
    steps = {step["name"]: step["digest"] for step in json.loads(done.stdout)["steps"]}
    return {name: steps[name] for name in STEPS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--is", dest="before", type=Path, help="file of digests that this script has printed")
    before = parser.parse_args().before
    now = digests_of_a_run()
    print(json.dumps(now, indent=2))
    if before is None:
        return 0
    was = json.loads(before.read_text("utf-8"))
    different = next((name for name in STEPS if now[name] != was[name]), None)
    print(f"the bytes of {different} differ" if different else "the same bytes", file=sys.stderr)
    return int(different is not None)


if __name__ == "__main__":
    raise SystemExit(main())
