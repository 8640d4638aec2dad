"""Answering closed questions by likelihood with a shared prefix, against generating the answers.

    .venv/bin/python benchmarks/scoring.py --model FOLDER      (default: the tiny preset, random weights)

All closed questions of the configured tasks about rendered faces, one model, the same bytes:

    ours      `Predictor.score`: one image encoding and few passes for all questions of a face, faces in batches
    plain     what its user would write with transformers: chat template, processor, `model.generate`, question by
              question, as many new tokens as the longest answer has
    batched   the same in left-padded batches of 32

A model of random weights seldom ends an answer, so that generating goes to the longest; a trained one ends it. Ratios
are time of theirs / time of ours. `same_answer` is the share of questions to which ours equals scoring each option by a
full forward pass of its own, `read` the share of plain texts that an answer can be read from, `same_as_generated` the
share of those whose answer is ours.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import in_turns, median, report
from PIL import Image

BATCH = 32


def faces(count: int) -> list[Image.Image]:
    """Rendered faces, one a person."""
    from facemllm.heads.render import render_identity

    rows = (render_identity(0, number, 1, 128)[0] for number in range(count))
    return [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in rows]


def chat(processor: Any, question: str, answer: str | None = None) -> str:
    """A question, and its answer if there is one, in the words of the model's own template."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if answer is None:
        return str(processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return str(processor.apply_chat_template(messages, tokenize=False))


@torch.inference_mode()
def generated(predictor: Any, asked: Sequence[tuple[Image.Image, str]], batch: int, longest: int) -> list[str]:
    """Greedy answers as transformers' documentation has them made."""
    model, processor = predictor.model, predictor.processor
    processor.tokenizer.padding_side = "left"
    texts: list[str] = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        inputs = processor(
            text=[chat(processor, question) for _, question in part],
            images=[[image] for image, _ in part],
            padding=True,
            return_tensors="pt",
        ).to(predictor.device, model.dtype)
        output = model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        texts += processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


@torch.inference_mode()
def separately(predictor: Any, image: Image.Image, question: str, options: Sequence[str]) -> list[float]:
    """Probabilities of the options, each scored by a full forward pass of its own (float64 softmax of the sums)."""
    model, processor = predictor.model, predictor.processor
    totals = []
    for option in options:
        texts = [chat(processor, question), chat(processor, question, option)]
        short, whole = (
            processor(text=[text], images=[[image]], return_tensors="pt").to(predictor.device, model.dtype)
            for text in texts
        )
        start, ids = short["input_ids"].shape[1], whole["input_ids"][0]
        end = start + ids[start:].tolist().index(processor.tokenizer.eos_token_id) + 1
        likelihood = model(**whole).logits[0].float().log_softmax(-1)
        totals.append(likelihood[range(start - 1, end - 1), ids[start:end]].double().sum())
    return torch.stack(totals).softmax(0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model directory")
    parser.add_argument("--faces", type=int, default=8)
    parser.add_argument("--checked", type=int, default=4, help="faces whose options are scored separately, too")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    from facemllm import settings, tasks
    from facemllm.model.inference import Predictor, Query
    from facemllm.model.tiny import build_tiny
    from facemllm.tasks.answers import answer

    chosen = settings.load("laptop")
    questions = [q for name in chosen.reformat.tasks for q in tasks.get(name).questions() if q.options]
    queries = [Query(q.templates[0], tuple(option.text for option in q.options)) for q in questions]
    texts = [text for query in queries for text in (query.question, *query.options)]
    if arguments.model is None:
        model = build_tiny(chosen.model, texts, texts, seed=0)
        predictor = Predictor(*model, device=arguments.device)
    else:
        predictor = Predictor.load(arguments.model, device=arguments.device)
    pictures = faces(arguments.faces)
    asked = [(picture, query.question) for picture in pictures for query in queries]
    longest = max(len(predictor.frame.answer(text)) for query in queries for text in query.options)
    said: dict[str, Any] = {}

    def ours() -> None:
        said["ours"] = predictor.score(pictures, [queries] * len(pictures))

    def plain() -> None:
        said["plain"] = generated(predictor, asked, 1, longest)

    def batched() -> None:
        said["batched"] = generated(predictor, asked, BATCH, longest)

    generated(predictor, asked[:2], 1, longest)
    seconds = in_turns(arguments.rounds, ours=ours, plain=plain, batched=batched)
    for name, times in seconds.items():
        print(f"{name:<8}{len(asked) / median(times):>9,.0f} questions/s")

    same = checked = 0
    for picture, scored in zip(pictures[: arguments.checked], said["ours"], strict=False):
        for question, query, one in zip(questions, queries, scored, strict=True):
            alone = separately(predictor, picture, query.question, query.options)
            same += answer(question, one.probabilities, None).text == answer(question, alone, None).text
            checked += 1
    chosen_texts = [
        query.options[one.best] for scored in said["ours"] for query, one in zip(queries, scored, strict=True)
    ]
    plainly = [
        (text, tasks.read(question, text), tasks.read(question, ours))
        for text, ours, question in zip(said["plain"], chosen_texts, questions * len(pictures), strict=True)
    ]
    read = [(theirs, ours) for _, theirs, ours in plainly if theirs is not None]
    ratios = {
        "plain_generate": median(seconds["plain"]) / median(seconds["ours"]),
        "batched_generate": median(seconds["batched"]) / median(seconds["ours"]),
        "same_answer": same / checked,
        "read": len(read) / len(plainly),
    }
    if read:
        ratios["same_as_generated"] = sum(theirs == ours for theirs, ours in read) / len(read)
    report(
        "closed questions by likelihood, against generate",
        ratios,
        ["torch", "transformers"],
        model="tiny preset, random weights" if arguments.model is None else "a given folder",
        device=arguments.device,
        faces=len(pictures),
        questions=len(asked),
        options=sum(len(query.options) for query in queries),
        checked=checked,
        longest_answer_tokens=longest,
        rounds=arguments.rounds,
    )


if __name__ == "__main__":
    main()
