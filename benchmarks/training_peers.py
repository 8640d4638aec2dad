"""HF Trainer and TRL's SFTTrainer on the same questions, set up as their users would.

A row is one question with its picture, as turns that do not see one another are trained elsewhere; or, with
`turns: many`, a picture's questions as an ordinary dialogue: later turns then read the earlier ones, which is another
thing to learn and shares the picture. Pictures are files, decoded and resized in the collator, every time they are
shown; with `prepared`, once before the clock starts, so that no picture work is in the ratio. Labels are the answers
and their end tokens. Optimiser, learning rates and clipping are those of the stage.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from training_material import Material

from facemllm.core import cost
from facemllm.model.families import family_class

IGNORED = -100


def dataset(rows: Sequence[Mapping[str, Any]], turns: str) -> Any:
    """Rows as a `datasets.Dataset`: `images` (one path), `turns` (questions and answers in turn) and `length`."""
    from datasets import Dataset

    dialogues = [
        (row["image"], part)
        for row in rows
        for part in ([row["turns"]] if turns == "many" else [[t] for t in row["turns"]])
    ]
    return Dataset.from_list(
        [
            {
                "images": [image],
                "turns": [text for turn in part for text in turn],
                "length": sum(len(text.split()) for turn in part for text in turn),
            }
            for image, part in dialogues
        ]
    )


def collate(
    rows: Sequence[Mapping[str, Any]],
    processor: Any,
    pixels: Mapping[str, Tensor] | None = None,
    side: int | None = None,
) -> dict[str, Tensor]:
    """A padded batch; `labels` are the tokens between the assistant's sign and the end of its turn, that end too.
    `pixels` are prepared pictures (3, S, S) by path; without, files are decoded and resized, to `side` where the
    processor takes any."""
    texts = [processor.apply_chat_template(_messages(row["turns"]), tokenize=False) for row in rows]
    padded = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    if pixels is None:
        images = [[_opened(path, side) for path in row["images"]] for row in rows]
        batch = processor(text=texts, images=images, **padded)
    else:
        shown = {"pixel_values": torch.stack([pixels[path] for row in rows for path in row["images"]])}
        token = processor.image_token
        texts = [text.replace(token, processor.replace_image_token(shown, n)) for n, text in enumerate(texts)]
        batch = {**processor.tokenizer(texts, **padded), **shown}
    tokenizer, ids_BL = processor.tokenizer, batch["input_ids"]
    opens_BL = ids_BL == tokenizer.convert_tokens_to_ids("<|assistant|>")
    ends_BL = ids_BL == tokenizer.eos_token_id
    inside_BL = (opens_BL.cumsum(1) > ends_BL.cumsum(1) - ends_BL.long()) & ~opens_BL
    batch["labels"] = ids_BL.masked_fill(~inside_BL, IGNORED)
    return dict(batch)


def _opened(path: str, side: int | None) -> Image.Image:
    image = Image.open(path).convert("RGB")
    return image if side is None else image.resize((side, side), Image.Resampling.BICUBIC)


def prepare_pixels(rows: Sequence[Mapping[str, Any]], processor: Any) -> dict[str, Tensor]:
    """Every picture (3, S, S) of the rows by its path, as the image processor makes it."""
    found = {}
    for path in dict.fromkeys(path for row in rows for path in row["images"]):
        with Image.open(path) as image:
            made = processor.image_processor(image.convert("RGB"), return_tensors="pt")
        found[path] = made["pixel_values"][0]
    return found


def _messages(turns: Sequence[str]) -> list[dict[str, Any]]:
    """Questions and answers in turn as chat messages, the picture before the first question."""
    said = [
        {"role": ("user", "assistant")[place % 2], "content": [{"type": "text", "text": text}]}
        for place, text in enumerate(turns)
    ]
    return [{"role": "user", "content": [{"type": "image"}, *said[0]["content"]]}, *said[1:]]


class Peer:
    """HF Trainer (`kind: hf`) or SFTTrainer (`trl`) on a prepared folder.

    `turns`: one or many a row; `grouped`: batches of like length; `workers`: of the data loader; `micro`: passes of a
    step; `prepared`: pictures are decoded and resized once, before the clock starts.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        turns: str = "one",
        grouped: bool = False,
        workers: int = 0,
        micro: int = 1,
        prepared: bool = False,
    ) -> None:
        self.material, self.prepared = Material.open(folder), prepared
        self.kind, self.turns, self.grouped, self.workers, self.micro = kind, turns, grouped, workers, micro

    def run(self, steps: int, every: int, precision: str, device: str = "cpu") -> dict[str, Any]:
        """Train fresh weights for so many steps; `marks` are (step, seconds, mean loss since the last mark)."""
        from facemllm.settings import Stage

        stage = Stage.model_validate(self.material.stage)
        model, processor = self.material.model()
        rows = self.material.rows()
        batch = stage.batch_images * (1 if self.turns == "many" else stage.turns_per_image)
        trainer = self._trainer(model, processor, stage, dataset(rows, self.turns), batch, steps, precision, device)
        watch = Watch(trainer, every)
        started = time.perf_counter()
        trainer.train()
        span = every * self.micro  # passes between two marks
        mean = [
            sum(float(loss) for loss in watch.losses[end - span : end]) / every
            for end in range(span, len(watch.losses) + 1, span)
        ]
        return {
            "marks": [(step, at - started, loss) for (step, at), loss in zip(watch.marks, mean, strict=True)],
            "tokens_per_step": watch.tokens / steps,
            "padding": 1 - watch.tokens / watch.cells,
            "flops_per_step": watch.flops_per_cell * watch.cells / steps,
        }

    def _trainer(
        self, model: Any, processor: Any, stage: Any, data: Any, batch: int, steps: int, precision: str, device: str
    ) -> Any:
        from facemllm.settings import load
        from facemllm.train import optimizer as train_optimizer

        given: dict[str, Any] = {
            "output_dir": str(self.material.folder / f"out-{self.kind}"),
            "per_device_train_batch_size": batch // self.micro,
            "gradient_accumulation_steps": self.micro,
            "max_steps": steps,
            "max_grad_norm": stage.clip,
            "bf16": precision == "bf16",
            "use_cpu": device == "cpu",
            "seed": self.material.seed,
            "train_sampling_strategy": "group_by_length" if self.grouped else "sequential",
            "length_column_name": "length",
            "dataloader_num_workers": self.workers,
            "dataloader_persistent_workers": bool(self.workers),
            "remove_unused_columns": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        wrapper = train_optimizer.set_trainable(model, stage.trains, load("laptop").train.lora, self.material.seed)
        if stage.trains.tower == "frozen":
            tower = family_class(model.config).tower(model).eval()
            tower.train = lambda mode=True: tower  # the trainers call it on everything
        optimizer = torch.optim.AdamW(
            train_optimizer.parameter_groups(model.to(device), stage), stage.learning_rate, (0.9, 0.98), fused=True
        )
        for group in optimizer.param_groups:
            group["lr"] *= group["factor"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(train_optimizer.schedule, stage))
        pixels = prepare_pixels(data, processor) if self.prepared else None
        common = {
            "model": wrapper or model,
            "train_dataset": data,
            "data_collator": partial(collate, processor=processor, pixels=pixels, side=self.material.shape.get("side")),
            "processing_class": processor,
            "optimizers": (optimizer, schedule),
        }
        if self.kind == "hf":
            from transformers import Trainer, TrainingArguments

            return Trainer(args=TrainingArguments(**given), **common)
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(
            args=SFTConfig(**given, max_length=None, completion_only_loss=False, gradient_checkpointing=False),
            **common,
        )


class Watch:
    """Notes of a trainer while it runs: marks (step, time), the loss of every pass, tokens with and without padding,
    and the operations a token (padding too) of the first pass, which is counted, and slow."""

    def __init__(self, trainer: Any, every: int) -> None:
        from transformers import PrinterCallback, TrainerCallback

        self.marks: list[tuple[int, float]] = []
        self.losses: list[Tensor] = []
        self.tokens = self.cells = 0
        self.flops_per_cell = 0.0
        inner = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *rest: Any) -> Tensor:
            self.tokens += int(inputs["attention_mask"].sum())
            self.cells += inputs["attention_mask"].numel()
            with nullcontext() if self.losses else cost.operations() as counter:
                loss: Tensor = inner(model, inputs, *rest)
            if not self.losses:
                self.flops_per_cell = counter.get_total_flops() / self.cells
            self.losses.append(loss.detach())
            return loss

        class Marks(TrainerCallback):
            def on_step_end(callback, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % every == 0:
                    if args.device.type == "cuda":
                        torch.cuda.synchronize()
                    self.marks.append((state.global_step, time.perf_counter()))

        trainer.remove_callback(PrinterCallback)
        trainer.training_step = training_step
        trainer.add_callback(Marks())
