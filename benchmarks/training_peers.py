"""HF Trainer and TRL's SFTTrainer on the same questions, set up as their users would.

A row is one question with its picture, as turns that do not see one another are trained elsewhere; or, with
`turns: many`, a picture's questions as an ordinary dialogue: later turns then read the earlier ones, which is another
thing to learn and shares the picture. Pictures are files, decoded in the collator, every time they are shown; labels
are the answers and their end tokens. Optimiser, learning rates and clipping are those of the stage.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from training_material import Material

IGNORED = -100


def dataset(rows: Sequence[Mapping[str, Any]], turns: str) -> Any:
    """Rows as a `datasets.Dataset`: `images` (one path), `turns` (questions and answers in turn) and `length`."""
    from datasets import Dataset

    dialogues = [
        (row["image"], part) for row in rows for part in ([row["turns"]] if turns == "many" else [[t] for t in row["turns"]])
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


def collate(rows: Sequence[Mapping[str, Any]], processor: Any) -> dict[str, Tensor]:
    """A padded batch; `labels` are the tokens between the assistant's sign and the end of its turn, that end too."""
    texts = [
        processor.apply_chat_template(
            [
                {"role": role, "content": [*([{"type": "image"}] if place == 0 else []), {"type": "text", "text": text}]}
                for place, text in enumerate(row["turns"])
                for role in (("user", "assistant")[place % 2],)
            ],
            tokenize=False,
        )
        for row in rows
    ]
    images = [[Image.open(path).convert("RGB") for path in row["images"]] for row in rows]
    batch = processor(text=texts, images=images, padding=True, padding_side="right", return_tensors="pt")
    tokenizer, ids_BL = processor.tokenizer, batch["input_ids"]
    opens_BL = ids_BL == tokenizer.convert_tokens_to_ids("<|assistant|>")
    ends_BL = ids_BL == tokenizer.eos_token_id
    inside_BL = (opens_BL.cumsum(1) > ends_BL.cumsum(1) - ends_BL.long()) & ~opens_BL
    batch["labels"] = ids_BL.masked_fill(~inside_BL, IGNORED)
    return dict(batch)


class Peer:
    """HF Trainer (`kind: hf`) or SFTTrainer (`trl`) on a prepared folder.

    `turns`: one or many a row; `grouped`: batches of like length; `workers`: of the data loader.
    """

    def __init__(self, folder: Path, kind: str, turns: str = "one", grouped: bool = False, workers: int = 0) -> None:
        self.material = Material.open(folder)
        self.kind, self.turns, self.grouped, self.workers = kind, turns, grouped, workers

    def run(self, steps: int, every: int, precision: str, device: str = "cpu") -> dict[str, Any]:
        """Train fresh weights for so many steps; `marks` are (step, seconds, mean loss since the last mark)."""
        from facemllm.settings import Stage

        stage = Stage.model_validate(self.material.stage)
        model, processor = self.material.model()
        rows = self.material.rows()
        batch = stage.batch_images * (1 if self.turns == "many" else stage.turns_per_image)
        trainer = self._trainer(model, processor, stage, dataset(rows, self.turns), batch, steps, precision, device)
        marks, losses, tokens = _watch(trainer, every)
        started = time.perf_counter()
        trainer.train()
        mean = [sum(float(loss) for loss in losses[end - every : end]) / every for end in range(every, steps + 1, every)]
        return {
            "marks": [(step, at - started, loss) for (step, at), loss in zip(marks, mean, strict=True)],
            "tokens_per_step": sum(real for real, _ in tokens) / steps,
            "padding": 1 - sum(real for real, _ in tokens) / sum(whole for _, whole in tokens),
        }

    def _trainer(
        self, model: Any, processor: Any, stage: Any, data: Any, batch: int, steps: int, precision: str, device: str
    ) -> Any:
        from facemllm.settings import load
        from facemllm.training import stages

        given: dict[str, Any] = {
            "output_dir": str(self.material.folder / f"out-{self.kind}"),
            "per_device_train_batch_size": batch,
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
            "gradient_checkpointing": False,
        }
        wrapper = stages.prepare(model, stage.trains, load("laptop").training.lora)
        if stage.trains.tower == "frozen":
            tower = model.model.vision_tower.eval()
            tower.train = lambda mode=True: tower  # the trainers call it on everything
        optimizer = torch.optim.AdamW(
            stages.parameter_groups(model.to(device), stage), stage.learning_rate, (0.9, 0.98), fused=True
        )
        for group in optimizer.param_groups:
            group["lr"] *= group["factor"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(stages.rate, stage))
        common = {
            "model": wrapper or model,
            "train_dataset": data,
            "data_collator": partial(collate, processor=processor),
            "processing_class": processor,
            "optimizers": (optimizer, schedule),
        }
        if self.kind == "hf":
            from transformers import Trainer, TrainingArguments

            return Trainer(args=TrainingArguments(**given), **common)
        from trl import SFTConfig, SFTTrainer

        return SFTTrainer(args=SFTConfig(**given, max_length=None, completion_only_loss=False), **common)


def _watch(trainer: Any, every: int) -> tuple[list[tuple[int, float]], list[Tensor], list[tuple[int, int]]]:
    """Marks of time, losses and tokens (real, whole) of each step, filled while the trainer runs."""
    from transformers import TrainerCallback

    marks: list[tuple[int, float]] = []
    losses: list[Tensor] = []
    tokens: list[tuple[int, int]] = []
    inner = trainer.training_step

    def training_step(model: Any, inputs: dict[str, Any], *rest: Any) -> Tensor:
        mask_BL = inputs["attention_mask"]
        tokens.append((int(mask_BL.sum()), mask_BL.numel()))
        loss: Tensor = inner(model, inputs, *rest)
        losses.append(loss.detach())
        return loss

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0:
                if args.device.type == "cuda":
                    torch.cuda.synchronize()
                marks.append((state.global_step, time.perf_counter()))

    trainer.training_step = training_step
    trainer.add_callback(Watch())
    return marks, losses, tokens
