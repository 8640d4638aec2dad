"""What LAION-Face (50 million pictures), 7B and 13B on 8 to 512 GPUs, and 10,000 requests a second would take.

    .venv/bin/python benchmarks/scale.py              # the tables of docs/scale.md
    .venv/bin/python benchmarks/scale.py --faces 1e6 --requests 500 --draws 500

A model, not a measurement: sums over rates. Each rate is a range with its source; figures are medians and 90 %
intervals over draws of all rates at once (triangular, independent). Queues and stragglers are simulated, failures come
by Daly's formula; `tests/unit/test_scale.py` holds each against the other. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Drawn = Mapping[str, Values]
HOUR, DAY = 3600.0, 86400.0
MEASURED, PROFILE, SHEET, PUBLISHED, GUESS = "measured here", "our profile", "data sheet", "published", "assumed"


@dataclass(frozen=True)
class Rate:
    """A rate that is not exactly known: lowest, likeliest and highest value, its unit, and where it comes from."""

    low: float
    likely: float
    high: float
    unit: str
    source: str

    def draw(self, generator: np.random.Generator, count: int) -> Values:
        """So many values, of a triangular distribution."""
        if self.low == self.high:
            return np.full(count, self.likely)
        return generator.triangular(self.low, self.likely, self.high, count)


RATES = {
    # data
    "download": Rate(
        300, 1_000, 1_400, "pictures a second, one node", f"{PUBLISHED}: img2dataset's 100 M in 20 h is the best case"
    ),
    "alive": Rate(0.5, 0.65, 0.75, "share of links", f"{PUBLISHED}: 75 % found by FaceCaption-15M in 2024; it falls"),
    "import_s": Rate(
        0.004, 0.008, 0.016, "core seconds a picture", f"{MEASURED}: .0009 at 178 x 218, of one thread; by pixels"
    ),
    "stored": Rate(50e3, 75e3, 110e3, "bytes a picture, JPEG quality 95, 336 pixels", GUESS),
    "tables": Rate(3, 3, 3, "tables that hold the pictures", "our formats: faces, annotated, conversations"),
    "questions": Rate(30, 60, 90, "turns a face that training may choose from", GUESS),
    "hash": Rate(1.1e9, 2.42e9, 4.1e9, "bytes a second, two cores", f"{MEASURED} (docs/promotion.md)"),
    "prompt_tokens": Rate(650, 730, 900, "tokens, picture and prompt of the annotator", GUESS),
    "reply_tokens": Rate(100, 160, 300, "tokens, caption and labels", GUESS),
    "decode": Rate(
        2_000,
        4_000,
        8_000,
        "tokens a second, 7B annotator, one GPU, large batches",
        f"{GUESS}, after vLLM's own figures",
    ),
    "replies": Rate(
        100,
        300,
        1_000,
        "replies a second, one driver and its SQLite",
        f"{GUESS}: not measured beyond one machine's loopback",
    ),
    # training
    "peak": Rate(989.4e12, 989.4e12, 989.4e12, "operations a second, dense bf16, H100 and H200", SHEET),
    "mfu": Rate(
        0.25,
        0.38,
        0.5,
        "share of the peak in one node",
        f"{PUBLISHED} range of 7B to 70B runs; ours on a GPU is not measured",
    ),
    "link": Rate(12e9, 40e9, 50e9, "bytes a second and GPU between nodes", f"{SHEET}: 100 to 400 Gb/s a GPU"),
    "hidden": Rate(0.0, 0.5, 0.8, "share of communication hidden behind the backward pass", GUESS),
    "jitter": Rate(0.01, 0.03, 0.08, "coefficient of variation of a worker's step", GUESS),
    "gpu_life": Rate(
        10_000, 50_700, 80_000, "GPU hours between failures", f"{PUBLISHED}: Llama 3, 419 in 54 days on 16,384"
    ),
    "restart_s": Rate(
        180, 420, 1_200, "seconds from a failure to the next step", f"{GUESS}; of which Ray {MEASURED}: 21.6"
    ),
    "copy": Rate(
        5e9, 12e9, 25e9, "bytes a second from a GPU to memory: training waits for this part of a checkpoint", SHEET
    ),
    "volume_read": Rate(0.5e9, 2e9, 8e9, "bytes a second of a ReadWriteMany volume, random reads", GUESS),
    # serving
    "serve_mfu": Rate(0.2, 0.35, 0.5, "share of the peak while prompts are read", f"{GUESS}: no GPU was at hand"),
    "pass_s": Rate(0.003, 0.006, 0.015, "seconds a pass beside its faces", GUESS),
    "option_tokens": Rate(120, 240, 480, "tokens a request beside the picture (8 questions, 24 options)", GUESS),
    "closed": Rate(
        1_450, 1_480, 1_510, "closed questions a second and core, small CLIP model", f"{MEASURED} (docs/serving.md)"
    ),
    "burst": Rate(1.2, 1.6, 2.5, "busiest minute over the mean", GUESS),
    "upload": Rate(60e3, 130e3, 400e3, "bytes a request, base64", GUESS),
    "picture_s": Rate(0.002, 0.004, 0.010, "core seconds to read and decode a request", GUESS),
    # prices
    "gpu_price": Rate(1.8, 2.8, 4.5, "$ a GPU hour, H100", f"{GUESS}, rental in 2025 and 2026"),
    "core_price": Rate(0.02, 0.04, 0.06, "$ a core hour", GUESS),
    "disk_price": Rate(20, 40, 150, "$ a TB and month, object store to fast volume", GUESS),
}


@dataclass(frozen=True)
class Model:
    """A base: parameters of language model, tower and adapters of rank 128, and tokens of a picture."""

    name: str
    language: float
    tower: float
    adapters: float
    image_tokens: int = 576


MODELS = (Model("7B", 6.74e9, 0.304e9, 0.320e9), Model("13B", 13.02e9, 0.304e9, 0.501e9))
STAGES = {"align": 60, "instruct": 200, "specialize": 200}
"""Text tokens a face: a caption, and eight turns."""
VOLUME, NODE_MEMORY, CACHED_SIDE = 2 * 2**40, 384 * 2**30, 336
TURN_BYTES = 36
"""Of `train.corpus.Corpus`, a turn: prompt and answer (16), task, follows, fact, item, form (12), share (8)."""


# Closed forms -------------------------------------------------------------------------------------------------------


def operations(model: Model, text_tokens: float, passes: float = 6) -> float:
    """Of training on one face: 2 a parameter and token for forward, backward by activations and recomputed forward (6;
    8 where the language model's own weights are trained), and 2 for the frozen tower."""
    tokens = model.image_tokens + text_tokens
    return passes * model.language * tokens + 2 * model.tower * (model.image_tokens + 1)


def all_reduce_s(size: float, gpus: int, link: Values) -> Values:
    """Seconds of a ring: each GPU sends and receives 2 (n - 1) / n of the bytes."""
    return 2 * (gpus - 1) / gpus * size / link


def young(save_s: Values, life_s: Values) -> Values:
    """The interval between checkpoints that loses least, to first order (Young 1974): sqrt(2 save life)."""
    return np.sqrt(2 * save_s * life_s)


def stretched(interval_s: Values, save_s: Values, restart_s: Values, life_s: Values) -> Values:
    """Wall time by useful time under failures of a constant rate that may strike at any time (Daly 2006, eq. 13)."""
    return life_s / interval_s * np.exp(restart_s / life_s) * np.expm1((interval_s + save_s) / life_s)


# Simulations --------------------------------------------------------------------------------------------------------


def slowest(workers: int, variation: float, generator: np.random.Generator, steps: int = 400) -> float:
    """Mean of the slowest of so many workers by the mean worker, over steps; log-normal, independent."""
    sigma = math.sqrt(math.log1p(variation**2))
    return float(generator.lognormal(-(sigma**2) / 2, sigma, (steps, workers)).max(1).mean())


def with_failures(
    work_s: float, interval_s: float, save_s: float, restart_s: float, life_s: float, generator: np.random.Generator
) -> float:
    """Wall seconds of one run that saves after every interval of work and goes on from there after a failure."""
    clock, left = 0.0, work_s
    while left > 1e-9:
        segment, fails = min(interval_s, left) + save_s, generator.exponential(life_s)
        if fails >= segment:
            clock, left = clock + segment, left - interval_s
            continue
        clock += fails
        while (fails := generator.exponential(life_s)) < restart_s:
            clock += fails
        clock += restart_s
    return clock


def latencies(
    rate: float, face_s: float, pass_s: float, batch: int, generator: np.random.Generator, requests: int = 20_000
) -> Values:
    """Seconds from arrival to answer at one replica: Poisson arrivals, one pass at a time over at most `batch` of those
    that wait, which takes `pass_s` and `face_s` a face. The first tenth is left out."""
    arrivals = np.cumsum(generator.exponential(1 / rate, requests))
    found, done, first = np.empty(requests), 0.0, 0
    while first < requests:
        begin = max(done, arrivals[first])
        last = min(first + batch, max(first + 1, int(np.searchsorted(arrivals, begin, "right"))))
        done = begin + pass_s + face_s * (last - first)
        found[first:last] = done - arrivals[first:last]
        first = last
    return found[requests // 10 :]


def busiest(face_s: float, pass_s: float, batch: int, limit_s: float, generator: np.random.Generator) -> float:
    """Requests a second at which the 99th percentile of one replica is `limit_s`; 0 where one request takes longer."""
    if face_s + pass_s > limit_s:
        return 0.0
    low, high = 0.0, batch / (pass_s + batch * face_s)
    seed = int(generator.integers(2**31))
    for _ in range(10):
        rate = (low + high) / 2
        late = np.quantile(latencies(rate, face_s, pass_s, batch, np.random.default_rng(seed), 6_000), 0.99) > limit_s
        low, high = (low, rate) if late else (rate, high)
    return low


# The three parts ----------------------------------------------------------------------------------------------------


def data(drawn: Drawn, faces: float, cores: int = 16) -> dict[str, Values]:
    """Pictures fetched, imported on one node of so many cores, annotated by a 7B model, kept."""
    annotated_s = 2 * MODELS[0].language * drawn["prompt_tokens"] / (drawn["peak"] * drawn["serve_mfu"])
    annotated_s = annotated_s + drawn["reply_tokens"] / drawn["decode"]
    bytes_each = drawn["stored"] * drawn["tables"]
    return {
        "links asked for (millions)": faces / drawn["alive"] / 1e6,
        "fetching, one node (days)": faces / drawn["alive"] / drawn["download"] / DAY,
        f"import, one node of {cores} cores (hours)": faces * drawn["import_s"] / cores / HOUR,
        "digest of one table, two cores (hours)": faces * drawn["stored"] / drawn["hash"] / HOUR,
        "annotation (GPU hours)": faces * annotated_s / HOUR,
        "annotation through one driver (days)": faces / drawn["replies"] / DAY,
        "three tables (TB)": faces * bytes_each / 1e12,
        "pixel cache of training (TB)": np.full_like(bytes_each, faces * CACHED_SIDE**2 * 3 / 1e12),
        "index of training, 8 workers a node (GB)": 8 * faces * drawn["questions"] * TURN_BYTES / 1e9,
        "fetch, import and annotation ($)": faces * annotated_s / HOUR * drawn["gpu_price"]
        + faces * drawn["import_s"] / HOUR * drawn["core_price"],
        "disks, a month ($)": faces * (bytes_each + CACHED_SIDE**2 * 3) / 1e12 * drawn["disk_price"],
    }


def training(
    drawn: Drawn, model: Model, gpus: int, faces: float, batch: int, generator: np.random.Generator
) -> dict[str, Values]:
    """The three stages, each once over all faces, by adapters (parameters replicated) with `batch` faces a step."""
    useful = drawn["peak"] * drawn["mfu"]
    each = math.ceil(batch / gpus)  # a GPU has whole faces; where there are fewer faces than GPUs, some have none
    late = np.array([slowest(min(gpus, batch), float(cv), generator, 40) for cv in drawn["jitter"]])
    moved = all_reduce_s(4 * model.adapters, gpus, drawn["link"]) * (1 - drawn["hidden"] if gpus > 1 else 0)
    wall, ideal, reading = np.zeros_like(useful), np.zeros_like(useful), np.zeros_like(useful)
    for text in STAGES.values():
        computed = each * operations(model, text) / useful
        read = batch * CACHED_SIDE**2 * 3 / drawn["volume_read"]
        wall += faces / batch * np.maximum(computed * late + moved, read)
        ideal += faces * operations(model, text) / useful / gpus
        reading += faces / batch * (read > computed * late + moved)
    life = drawn["gpu_life"] * HOUR / gpus
    save = 12 * model.adapters / drawn["copy"]  # weights and two moments in 32 bits; writing goes on beside training
    best = young(save, life)
    wall = wall * stretched(best, save, drawn["restart_s"], life)
    return {
        "days": wall / DAY,
        "of ideal": ideal / wall,
        "$": wall / HOUR * gpus * drawn["gpu_price"],
        "failures": wall / life,
        "checkpoint every (minutes)": best / 60,
        "draws in which the volume is the limit": reading / (3 * faces / batch),
    }


def serving(
    drawn: Drawn, model: Model, requests: float, limit_s: float, generator: np.random.Generator
) -> dict[str, Values]:
    """GPUs for so many requests a second in the mean: a picture with eight closed questions each; a GPU a replica."""
    tokens = model.image_tokens + drawn["option_tokens"]
    face_s = (2 * model.language * tokens + 2 * model.tower * model.image_tokens) / (drawn["peak"] * drawn["serve_mfu"])
    alone = np.array([busiest(f, p, 16, limit_s, generator) for f, p in zip(face_s, drawn["pass_s"], strict=True)])
    replicas = np.ceil(requests * drawn["burst"] / np.where(alone > 0, alone, np.nan))
    return {
        "one face (ms)": (face_s + drawn["pass_s"]) * 1e3,
        "requests a second and GPU": alone,
        "used share of a GPU": alone * face_s,
        "GPUs": replicas,
        "$ an hour": replicas * drawn["gpu_price"],
        "$ a million requests": replicas * drawn["gpu_price"] / requests / HOUR * 1e6,
        "cores that decode": requests * drawn["burst"] * drawn["picture_s"],
        "ingress (Gbit/s)": requests * drawn["burst"] * drawn["upload"] * 8 / 1e9,
        "weights to load for a roll-out (TB)": replicas * 2 * (model.language + model.tower) / 1e12,
        "cores instead, small CLIP model": requests * drawn["burst"] * 8 / drawn["closed"],
    }


def limits(drawn: Drawn) -> dict[str, Values]:
    """Where each part of what is there stops, in faces, GPUs or requests a second; the smallest goes first."""
    pixels = CACHED_SIDE**2 * 3
    every = {"fill": 128 / 5, "batch": 128.0, "proxy": 1 / 0.0007}
    return {
        "faces: volume of 2 TiB holds tables and pixel cache": VOLUME / (drawn["stored"] * drawn["tables"] + pixels),
        "faces: index of 8 workers in 384 GiB": NODE_MEMORY / (8 * drawn["questions"] * TURN_BYTES),
        "faces: annotation by one driver in 5 days": drawn["replies"] * 5 * DAY,
        "faces: import on 16 cores in a day": 16 * DAY / drawn["import_s"],
        "GPUs: rows of five faces, batch of 128": np.full_like(pixels / drawn["stored"], every["fill"]),
        "GPUs: one face each, batch of 128": np.full_like(pixels / drawn["stored"], every["batch"]),
        "GPUs: the volume's random reads (7B)": drawn["volume_read"]
        / pixels
        / (drawn["peak"] * drawn["mfu"] / operations(MODELS[0], 200)),
        "requests a second: the local proxy, one process": np.full_like(pixels / drawn["stored"], every["proxy"]),
    }


def shown(values: Values) -> str:
    """Median and 90 % interval, in two or three digits."""
    low, middle, high = (float(f"{value:.3g}") for value in np.nanquantile(values, (0.05, 0.5, 0.95)))
    return f"{middle:,g}" if low == high else f"{middle:,g} ({low:,g} to {high:,g})"


def table(title: str, rows: Mapping[str, Values]) -> str:
    """A table of two columns in Markdown."""
    return "\n".join(
        [f"| {title} | median (90 % of draws) |", "|---|---|", *(f"| {n} | {shown(v)} |" for n, v in rows.items())]
    )


def matrix(title: str, columns: list[str], rows: Mapping[str, list[str]]) -> str:
    """A table of several columns in Markdown."""
    head = [f"| {title} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items())])


def swings(make: Callable[[Drawn], Values], names: list[str]) -> dict[str, list[str]]:
    """What each rate alone does to a figure: at its lowest and highest value, all others at their likeliest."""
    at = {name: np.array([rate.likely]) for name, rate in RATES.items()}
    found = {}
    for name in names:
        ends = [float(make(at | {name: np.array([end])})[0]) for end in (RATES[name].low, RATES[name].high)]
        found[f"`{name}`"] = [f"{float(f'{end:.3g}'):,g}" for end in ends]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faces", type=float, default=50e6)
    parser.add_argument("--requests", type=float, default=10_000)
    parser.add_argument("--limit", type=float, default=0.5, help="seconds that 99 %% of requests may take")
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    generator = np.random.default_rng(given.seed)
    drawn = {name: rate.draw(generator, given.draws) for name, rate in RATES.items()}
    facts = data(drawn, given.faces)
    print(table(f"data, {given.faces:,g} faces", facts), end="\n\n")
    trained: dict[str, list[str]] = {}
    for model in MODELS:
        for batch in (256, 4096):
            for gpus in (8, 32, 128, 512):
                one = training(drawn, model, gpus, given.faces, batch, generator)
                facts |= {f"{model.name} {gpus} GPUs batch {batch} {name}": value for name, value in one.items()}
                trained[f"{model.name}, {gpus} GPUs, batch {batch:,}"] = [shown(value) for value in one.values()]
    print(matrix("training", list(one), trained), end="\n\n")
    for model in MODELS:
        served = serving(drawn, model, given.requests, given.limit, generator)
        facts |= {f"serving {model.name} {name}": value for name, value in served.items()}
        print(table(f"serving {given.requests:,g} requests a second, {model.name}", served), end="\n\n")
    facts |= limits(drawn)
    print(table("what stops where", limits(drawn)), end="\n\n")
    days = swings(
        lambda at: training(at, MODELS[0], 128, given.faces, 4096, np.random.default_rng(0))["days"],
        ["mfu", "jitter", "link", "hidden", "gpu_life", "restart_s", "volume_read"],
    )
    print(matrix("days of 7B on 128 GPUs, batch 4,096, if one rate is", ["lowest", "highest"], days), end="\n\n")
    gpus = swings(
        lambda at: serving(at, MODELS[0], given.requests, given.limit, np.random.default_rng(0))["GPUs"],
        ["serve_mfu", "burst", "option_tokens", "pass_s"],
    )
    print(matrix("GPUs that serve 7B, if one rate is", ["lowest", "highest"], gpus), end="\n\n")
    rates = {f"`{name}`": [f"{r.low:,g} – {r.likely:,g} – {r.high:,g}", r.unit, r.source] for name, r in RATES.items()}
    print(matrix("rate", ["lowest – likeliest – highest", "unit", "source"], rates), end="\n\n")
    print(json.dumps({"name": "scale", "figures": {name: shown(value) for name, value in facts.items()}}))


if __name__ == "__main__":
    main()
