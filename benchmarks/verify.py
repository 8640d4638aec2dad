"""Verifying a model directory, against reading it from the disk and against hashing alone, one thread a core.

    .venv/bin/python benchmarks/verify.py --gigabytes 10

The work: files of random bytes (none of them sparse, all pushed out of the page cache before every turn), hashed and
compared (`manifest`), and, as the model server does it, which loads from them, copied to a private folder meanwhile
(`copy`). Beside it, in turns: `disk`, the same files read one after another and thrown away; `hash`, SHA-256 over
memory by a thread a core, as many bytes; `cp`, the same files read and written without a hash. What verification can
reach at best is the slower of `disk` and `hash`; `reached` is that time / ours.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import Memory, in_turns, median, report

from facemllm.core.machine import cores
from facemllm.signing import manifest

BLOCK = 1 << 20


def make(folder: Path, size: int, files: int) -> None:
    """Files of random bytes, `size` bytes together, written to the disk."""
    folder.mkdir()
    block = os.urandom(64 * BLOCK)
    for number in range(files):
        with (folder / f"model-{number:05d}.safetensors").open("wb") as file:
            file.write(number.to_bytes(8, "big"))
            left = size // files - 8
            while left > 0:
                left -= file.write(block[: min(left, len(block))])
            file.flush()
            os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Push a folder's files out of the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    """Run and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--files", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: the temporary folder")
    arguments = parser.parse_args()
    size, threads = int(arguments.gigabytes * 1e9), cores()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        model = Path(name) / "model"
        make(model, size, arguments.files)
        digest = manifest.of(model).digest

        def disk() -> None:
            forget(model)
            block = bytearray(BLOCK)
            for path in sorted(model.iterdir()):
                with path.open("rb", buffering=0) as file:
                    while file.readinto(block):
                        pass

        def hash_alone() -> None:
            block = os.urandom(BLOCK)

            def work() -> None:
                hashed = hashlib.sha256()
                for _ in range(size // BLOCK // threads):
                    hashed.update(block)

            with ThreadPoolExecutor(threads) as pool:
                for one in [pool.submit(work) for _ in range(threads)]:
                    one.result()

        def verify() -> None:
            forget(model)
            manifest.require(model, digest)

        def copy() -> None:
            forget(model)
            with manifest.verified_copy(model, digest, Path(name)):
                pass

        def cp() -> None:
            forget(model)
            block = memoryview(bytearray(BLOCK))
            with tempfile.TemporaryDirectory(dir=name) as out:
                for path in sorted(model.iterdir()):
                    with path.open("rb", buffering=0) as file, Path(out, path.name).open("wb", buffering=0) as written:
                        while count := file.readinto(block):
                            written.write(block[:count])

        with Memory() as memory:
            verify()
            copy()
        work = {"disk": disk, "hash": hash_alone, "cp": cp, "manifest": verify, "copy": copy}
        seconds = in_turns(arguments.rounds, **work)
    took = {who: median(times) for who, times in seconds.items()}
    for who, one in took.items():
        print(f"{who:<10}{size / one / 1e9:>6.2f} GB/s")
    best = max(took["disk"], took["hash"])
    ratios = {"reached": best / took["manifest"], "reached_with_copy": best / took["copy"]}
    ratios["cp_over_copy"] = took["cp"] / took["copy"]
    more = {"gigabytes": arguments.gigabytes, "files": arguments.files, "threads": threads, "memory_mib": memory.mib()}
    report("verifying a model directory", ratios, [], rounds=arguments.rounds, **more)


if __name__ == "__main__":
    main()
