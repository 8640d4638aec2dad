"""The training loop: what a step sees, what a stage changes, how it resumes, and that packing changes nothing."""

import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facemllm import settings
from facemllm.model.forward import image_tokens
from facemllm.model.inference import Predictor, Query
from facemllm.model.pixels import normalise
from facemllm.model.preset import build_tiny
from facemllm.model.prompts import Frame
from facemllm.records import CONVERSATIONS, TableWriter, open_table
from facemllm.settings import Stage, Trainable
from facemllm.training import augment, stages
from facemllm.training.data import mirror_text, pixel_cache, read_turns, tokenise, vocabulary_texts
from facemllm.training.loop import Job, run_stage
from facemllm.training.step_loss import Faces
from facemllm.training.objectives import answer_losses
from facemllm.training.packing import IGNORED, Planner, pack, word_bags

COLORS = {"red hair": (200, 40, 40), "green hair": (40, 200, 40), "blue hair": (40, 40, 200)}
SIDES = ("turned 25 degrees left", "turned 25 degrees right")


def face(number):
    """A coloured square with a bright half: which colour and which side are what there is to learn."""
    generator = np.random.default_rng(number)
    color = list(COLORS)[number % 3]
    side = number // 3 % 2
    pixels = np.clip(generator.normal(COLORS[color], 12, (64, 64, 3)), 0, 255).astype(np.uint8)
    pixels[:, 32 * side : 32 * side + 32] //= 2
    return pixels, color, SIDES[side]


def conversation(number, split="train"):
    pixels, color, side = face(number)
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "PNG")
    asked = [
        ("caption", "open", "Describe this face.", [], f"A face with {color}; head {side}."),
        ("attributes", "choice", "Which hair?", list(COLORS), color),
        ("attributes", "boolean", "Is the hair red?", ["yes", "no"], "yes" if color == "red hair" else "no"),
        ("head_pose", "number", "How is the head turned?", list(SIDES), side),
    ]
    messages = []
    for place, (_, _, question, _, answer) in enumerate(asked):
        image = [{"type": "image", "text": None}] if place == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    turn = {"template": "t", "follows": False}
    return {
        "conversation_id": f"c{number}",
        "image_id": f"i{number}",
        "images": [{"bytes": encoded.getvalue(), "path": None}],
        "split": split,
        "source": "toy",
        "subject_id": f"s{number}",
        "messages": messages,
        "turns": [
            {**turn, "sample_id": f"{number}-{k}", "task": t, "form": f, "options": o, "answer": a}
            for k, (t, f, _, o, a) in enumerate(asked)
        ],
    }


TASKS = {"attributes": 1.0, "head_pose": 1.0, "caption": 0.2}


def stage(**changes):
    given = {
        "trains": dict.fromkeys(stages.MODULES, "full"),
        "tasks": TASKS,
        "objective": "answers",
        "steps": 8,
        "batch_images": 6,
        "turns_per_image": 3,
        "learning_rate": 1e-3,
        "rates": {"tower": 0.5},
        "weight_decay": 0.05,
        "schedule": "warmup_stable_decay",
        "warmup": 0.1,
        "decay": 0.5,
        "clip": 1.0,
        "augment": True,
    }
    return Stage.model_validate(given | changes)


class Toy:
    """A small table, its pixels and corpus, and fresh presets."""

    def __init__(self, folder):
        torch.set_num_threads(1)
        self.settings = settings.load("laptop", ["model.image_size=32"])
        with TableWriter(folder / "table", CONVERSATIONS) as writer:
            writer.write(conversation(n, "test" if n % 5 == 4 else "train") for n in range(40))
        self.table = open_table(folder / "table", CONVERSATIONS)
        self.turns = read_turns(self.table, "train")
        model, self.processor = self.fresh()
        self.frame = Frame.of(model, self.processor)
        self.corpus = tokenise(self.turns, self.frame)
        self.cache = folder / "cache"
        self.pixels = pixel_cache(self.table, self.processor.image_processor, self.cache)

    def fresh(self, seed=1):
        return build_tiny(self.settings.model, *vocabulary_texts(self.turns), seed)

    def run(self, plan, name="toy", model=None, **options):
        lora = self.settings.training.lora
        job = {"checkpoint_every": 3, "log_every": 1, "precision": "fp32"}
        job |= {k: options.pop(k) for k in list(options) if k in ("precision", "rank", "world", "checkpoint_every")}
        return run_stage(
            Job(name=name, stage=plan, lora=lora, seed=5, key="k", model=self.settings.model, **job),
            model or self.fresh()[0],
            self.processor,
            self.corpus,
            Faces(self.pixels),
            **options,
        )


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Toy(tmp_path_factory.mktemp("toy"))


def decoded(toy, text):
    return toy.processor.tokenizer.decode(toy.corpus.texts[text])


def test_mirroring_swaps_left_and_right_as_words():
    assert (
        mirror_text("Turned left, LEFT of Right; leftover upright") == "Turned right, RIGHT of Left; leftover upright"
    )


def test_mirrored_faces_are_asked_and_answered_mirrored(toy):
    corpus = toy.corpus
    swapped = 0
    for turn in range(len(corpus.task)):
        plain, mirrored = (decoded(toy, corpus.answer[turn, m]) for m in (0, 1))
        assert mirrored == mirror_text(plain)
        swapped += plain != mirrored
    assert swapped == 2 * len(corpus)  # head pose and caption of every face
    pose = toy.processor.tokenizer.convert_tokens_to_ids(list(SIDES))
    bags = word_bags(corpus, [np.array([0]), np.array([0])], np.array([False, True]), len(toy.processor.tokenizer))
    assert bags[0, pose].tolist() == bags[1, pose].tolist()[::-1] != [0, 0]


def test_a_mirrored_picture_is_the_mirrored_picture(toy):
    pixels = torch.from_numpy(np.array(toy.pixels[:2]))
    still = augment.Changes(
        np.array([False, True]),
        np.zeros((2, 2), int),
        np.ones((2, 1, 1, 1), np.float32),
        np.zeros((2, 1, 1, 3), np.float32),
    )
    changed = augment.apply(pixels, still)
    torch.testing.assert_close(changed[0], pixels[0].float())
    torch.testing.assert_close(changed[1], pixels[1].flip(1).float())


def test_pixels_are_decoded_once_and_in_row_order(toy):
    path = next(toy.cache.glob("*.npy"))
    written = path.stat().st_mtime_ns
    again = pixel_cache(toy.table, toy.processor.image_processor, toy.cache)
    assert path.stat().st_mtime_ns == written
    assert again.shape == (40, 32, 32, 3)
    assert toy.corpus.pixel_row.tolist() == [n for n in range(40) if n % 5 != 4]
    red = [n for n in range(40) if n % 3 == 0]
    assert (again[red].mean((1, 2)).argmax(1) == 0).all()
    assert not list(toy.cache.glob("*.partial"))


def test_turns_stay_with_their_pictures_in_a_table_of_many_batches(tmp_path):
    def row(number):
        made = conversation(0, "test" if number % 3 == 0 else "train")
        made["conversation_id"], made["image_id"] = f"c{number}", f"i{number}"
        made["messages"][-1]["content"][0]["text"] = f"answer {number}"
        made["turns"] = made["turns"][: 4 - number % 2]  # three or four turns
        made["messages"] = made["messages"][: 8 - 2 * (number % 2)]
        made["messages"][1]["content"][0]["text"] = f"caption {number}"
        return made

    with TableWriter(tmp_path / "many", CONVERSATIONS) as writer:
        writer.write(row(number) for number in range(2200))
    turns = read_turns(open_table(tmp_path / "many", CONVERSATIONS), "train")
    numbers = [number for number in range(2200) if number % 3]
    assert turns.pixel_row.tolist() == numbers
    assert turns.count.tolist() == [4 - number % 2 for number in numbers]
    first = np.concatenate([[0], np.cumsum(turns.count)[:-1]])
    assert turns.answer.take(first).to_pylist() == [f"caption {number}" for number in numbers]
    assert set(turns.question.take(first).to_pylist()) == {"Describe this face."}


def test_a_vocabulary_is_of_questions_and_answers_mirrored_too(toy):
    texts, answers = vocabulary_texts(toy.turns)
    caption = "A face with red hair; head turned 25 degrees left."
    assert {"Which hair?", caption, mirror_text(caption)} <= set(texts)
    assert set(answers) == {"yes", "no", *COLORS, *SIDES}


def test_a_question_that_follows_begins_as_a_later_one(toy, tmp_path):
    row = conversation(0)
    row["messages"][4]["content"][0]["text"] = row["messages"][2]["content"][0]["text"]  # one wording, two places
    row["turns"][2]["follows"] = True
    with TableWriter(tmp_path / "talk", CONVERSATIONS) as writer:
        writer.write([row])
    first, rest = toy.frame.first
    frame = replace(toy.frame, later=(f"A face. {first}", rest))  # the tiny template begins all questions alike
    corpus = tokenise(read_turns(open_table(tmp_path / "talk", CONVERSATIONS), "train"), frame)
    assert corpus.follows.tolist() == [False, False, True, False]
    said = [corpus.texts[text].tolist() for text in corpus.prompt[:, 0]]
    assert said[1] == frame.prompt("Which hair?")
    assert said[2] == frame.prompt("Which hair?", follows=True)
    assert said[1] != said[2]
    assert corpus.texts[corpus.prompt[2, 1]].tolist() == said[2]  # mirrored it reads the same, and still follows


def test_two_sizes_of_picture_share_a_cache_and_nothing_else(toy, tmp_path):
    small = pixel_cache(toy.table, toy.processor.image_processor, tmp_path)
    model = settings.load("laptop", ["model.image_size=64"]).model
    larger = build_tiny(model, *vocabulary_texts(toy.turns), 1)[1].image_processor
    large = pixel_cache(toy.table, larger, tmp_path)
    assert (small.shape, large.shape) == ((40, 32, 32, 3), (40, 64, 64, 3))
    assert len(list(tmp_path.glob("*.npy"))) == 2
    again = pixel_cache(toy.table, toy.processor.image_processor, tmp_path)
    assert (again == small).all()


def test_a_plan_depends_on_the_step_alone(toy):
    plans = [Planner(toy.corpus, stage(), "toy", 5, 32) for _ in range(2)]
    for step in (7, 0, 3):
        one, other = plans[0].plan(step), plans[1].plan(step)
        assert one.rows.tolist() == other.rows.tolist()
        assert [t.tolist() for t in one.turns] == [t.tolist() for t in other.turns]
        assert (one.changes.mirror == other.changes.mirror).all()
    epoch = [row for step in range(16) for row in plans[0].plan(step).rows.tolist()]
    assert sorted(epoch[:32]) == list(range(32))
    assert epoch[:32] != epoch[32:64]
    assert plans[0].plan(0).rows.tolist() != Planner(toy.corpus, stage(), "other", 5, 32).plan(0).rows.tolist()


def test_turns_are_drawn_by_weight_without_repeats(toy):
    planner = Planner(toy.corpus, stage(tasks={"attributes": 4.0, "head_pose": 1.0}, turns_per_image=1), "toy", 5, 32)
    drawn = np.concatenate([t for step in range(200) for t in planner.plan(step).turns])
    names = np.array(toy.corpus.tasks)[toy.corpus.task[drawn]]
    assert set(names) == {"attributes", "head_pose"}
    assert abs((names == "attributes").mean() - 8 / 9) < 0.03  # two attribute turns of weight 4 against one of 1
    full = Planner(toy.corpus, stage(turns_per_image=9), "toy", 5, 32).plan(0)
    assert all(sorted(t.tolist()) == list(range(t.min(), t.min() + 4)) for t in full.turns)


def test_a_turn_that_follows_stays_with_the_turn_before(toy):
    follows = toy.corpus.follows.copy()
    follows[2::4] = True  # the third turn of every face depends on the second
    corpus = type(toy.corpus)(**{**vars(toy.corpus), "follows": follows})
    planner = Planner(corpus, stage(tasks={"attributes": 1.0}, turns_per_image=1), "toy", 5, 32)
    plan = planner.plan(0)
    assert all(len(t) == 2 and t[1] == t[0] + 1 for t in plan.turns)
    packed = pack(corpus, plan.turns, np.zeros(6, bool))
    row = packed.block[0] >= 0
    assert set(packed.block[0][row]) == {0}
    assert packed.position[0][row].tolist() == list(range(row.sum()))


def loss_and_gradients(toy, model, turns, rows):
    pixels = torch.from_numpy(np.array(toy.pixels[toy.corpus.pixel_row[rows]]))
    image = image_tokens(model, normalise(pixels, toy.processor.image_processor))
    loss = answer_losses(model, image, toy.frame.prefix_ids, pack(toy.corpus, turns, np.zeros(len(turns), bool)))[0].sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_packed_loss_and_gradients_are_the_sum_of_the_unpacked(toy):
    model = toy.fresh()[0].eval()  # batch statistics would differ; everything else is as in training
    turns = [np.array([0, 1, 3]), np.array([6, 5]), np.array([8, 9, 10, 11])]
    rows = np.array([0, 1, 2])
    packed, gradients = loss_and_gradients(toy, model, turns, rows)
    total, summed = torch.tensor(0.0), {}
    for row, chosen in zip(rows, turns, strict=True):
        for turn in chosen:
            loss, parts = loss_and_gradients(toy, model, [np.array([turn])], np.array([row]))
            total = total + loss
            for name, gradient in parts.items():
                summed[name] = summed.get(name, 0) + gradient
    torch.testing.assert_close(packed, total, atol=1e-3, rtol=1e-5)
    assert set(gradients) == set(summed)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, summed[name], atol=2e-4, rtol=2e-3, msg=name)


def test_labels_stand_on_answer_and_end_tokens_only(toy):
    packed = pack(toy.corpus, [np.array([1, 0])], np.array([False]))
    wanted = packed.target[0][packed.target[0] != IGNORED]
    text = toy.processor.tokenizer.decode(wanted)
    assert text == f"{decoded(toy, toy.corpus.answer[1, 0])} {decoded(toy, toy.corpus.answer[0, 0])}"
    assert text.count("</s>") == 2
    # each label is the token that follows in its own block
    for place in np.flatnonzero(packed.target[0] != IGNORED):
        assert packed.ids[0, place + 1] == packed.target[0, place]
        assert packed.block[0, place + 1] == packed.block[0, place]


MODES = {
    "align": ({"tower": "full", "projector": "full", "embeddings": "full", "language": "frozen"}, "caption_words"),
    "instruct": ({"tower": "frozen", "projector": "full", "embeddings": "full", "language": "full"}, "answers"),
    "specialize": ({"tower": "full", "projector": "full", "embeddings": "full", "language": "full"}, "answers"),
    "projector": ({"tower": "frozen", "projector": "full", "embeddings": "frozen", "language": "frozen"}, "answers"),
    "adapters": ({"tower": "frozen", "projector": "full", "embeddings": "frozen", "language": "lora"}, "answers"),
}


@pytest.mark.parametrize("name", MODES)
def test_a_stage_changes_what_it_declares_and_nothing_else(toy, name):
    trains, objective = MODES[name]
    before = {n: t.clone() for n, t in toy.fresh()[0].state_dict().items()}
    plan = stage(trains=trains, objective=objective, steps=3, tasks={"caption": 1.0, "attributes": 1.0})
    model = toy.run(plan, name).model
    after = model.state_dict()
    assert set(after) == set(before)
    untouched = {n for n in before if "num_batches" not in n and torch.equal(before[n], after[n])}
    for tensor in before:
        if "num_batches" in tensor:
            assert (after[tensor] > 0) == (trains["tower"] != "frozen")
            continue
        mode = trains[stages.module_of(tensor)]
        adapted = mode == "lora" and "_proj.weight" in tensor
        assert (tensor not in untouched) == (mode == "full" or adapted), tensor


def test_adapters_never_reach_the_tower(toy):
    model, _ = toy.fresh()
    stages.prepare(model, Trainable.model_validate(MODES["adapters"][0]), toy.settings.training.lora)
    adapted = {n.split(".lora_")[0] for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(adapted) == 3 * 7  # layers x linear maps
    assert all("language_model" in n for n in adapted)


def test_a_bad_merge_is_noticed(toy):
    model, _ = toy.fresh()
    wrapper = stages.prepare(model, Trainable.model_validate(MODES["adapters"][0]), toy.settings.training.lora)

    class Careless:
        def merge_and_unload(self):
            merged = wrapper.merge_and_unload()
            merged.get_input_embeddings().weight.data += 0.1
            return merged

    ids = torch.tensor([[7, 8, 9]])
    with pytest.raises(RuntimeError, match="merging the adapters changed"):
        stages.merge(model, Careless(), (ids, torch.ones_like(ids)))


@pytest.mark.parametrize("objective", ["caption_words", "answers"])
def test_a_resumed_run_ends_with_the_same_bytes(toy, tmp_path, objective):
    plan = stage(objective=objective)
    folders = []

    def keep(step, write):
        folders.append(tmp_path / f"{step}")
        folders[-1].mkdir()
        write(folders[-1])

    logged = []
    whole = toy.run(plan, keep=keep, log=lambda step, metrics: logged.append((step, metrics)))
    assert [f.name for f in folders] == ["3", "6"]
    assert {p.suffix for p in folders[0].iterdir()} == {".safetensors", ".json"}
    seen = []
    resumed = toy.run(plan, resume=folders[0], log=lambda step, metrics: seen.append((step, metrics)))
    assert (whole.resumed_from, resumed.resumed_from) == (0, 3)
    assert (resumed.tokens, resumed.final_loss) == (whole.tokens, whole.final_loss)
    assert [(s, m["grad_norm"]) for s, m in seen] == [(s, m["grad_norm"]) for s, m in logged[3:]]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_checkpoint_of_another_run_is_refused(toy, tmp_path):
    plan = stage(steps=4)
    toy.run(plan, keep=lambda step, write: write(tmp_path))
    state = json.loads((tmp_path / "training.json").read_text())
    (tmp_path / "training.json").write_text(json.dumps(state | {"key": "other"}))
    with pytest.raises(Exception, match="other settings or data"):
        toy.run(plan, resume=tmp_path)


def test_a_loss_that_is_not_finite_stops_with_the_step_named(toy):
    with pytest.raises(FloatingPointError, match=r"stage toy: .* at step [1-9]"):
        toy.run(stage(learning_rate=0.99, clip=1e9, augment=False), model=poisoned(toy))


def poisoned(toy):
    model, _ = toy.fresh()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] = math.nan
    return model


def test_schedules():
    cosine = stage(schedule="cosine", steps=100, warmup=0.1, decay=0.9)
    rates = [stages.rate(cosine, step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(stages.FLOOR + (1 - stages.FLOOR) / 2)
    assert rates[100] == pytest.approx(stages.FLOOR)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    stable = stage(schedule="warmup_stable_decay", steps=100, warmup=0.0, decay=0.4)
    rates = [stages.rate(stable, step) for step in range(101)]
    assert rates[:61] == [1.0] * 61
    assert rates[80] == pytest.approx(stages.FLOOR + (1 - stages.FLOOR) / 2)
    assert stages.rate(stage(warmup=0.0, decay=0.0), 7) == 1.0


def test_the_tower_has_a_rate_of_its_own_and_norms_no_decay(toy):
    model, _ = toy.fresh()
    groups = stages.parameter_groups(model, stage(rates={"tower": 0.2}))
    names = {id(p): n for n, p in model.named_parameters()}
    held = {(g["factor"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert sum(map(len, held.values())) == len(names)
    assert all("vision_tower" in n for key, group in held.items() if key[0] == 0.2 for n in group)
    undecayed = {n for key, group in held.items() if key[1] == 0 for n in group}
    assert undecayed == {n for n, p in model.named_parameters() if p.ndim < 2 or "embed_tokens" in n}


def test_it_learns_and_answers_new_faces(toy):
    questions = [Query("Which hair?", tuple(COLORS)), Query("How is the head turned?", SIDES)]
    rows = [n for n in range(40) if n % 5 == 4]
    words = stage(objective="caption_words", tasks={"caption": 1.0}, steps=40, batch_images=16, learning_rate=4e-3)
    aligned = toy.run(words, "align", precision="bf16").model
    plan = stage(steps=60, batch_images=8, learning_rate=2e-3)
    losses = []
    model = toy.run(plan, model=aligned, precision="bf16", log=lambda _, m: losses.append(m["loss"])).model
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    answers = Predictor(model, toy.processor).score([face(n)[0] for n in rows], [questions] * len(rows))
    right = [answer[0].best == n % 3 for answer, n in zip(answers, rows, strict=True)]
    assert np.mean(right) > 0.8


SCRIPT = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from test_training import MODES, Toy, stage
rank, folder = int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
toy = Toy(folder / f"rank{rank}")
plan = stage(trains=MODES["instruct"][0], steps=4)
out = toy.run(plan, rank=rank, world=2)
torch.save(out.model.state_dict(), folder / f"{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.integration
def test_two_workers_learn_what_one_does(toy, tmp_path):
    plan = stage(trains=MODES["instruct"][0], steps=4)
    one = toy.run(plan).model.state_dict()
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent)]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [p.wait(timeout=120) for p in ranks] == [0, 0]
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    start = toy.fresh()[0].state_dict()
    moved = 0.0
    for name, tensor in one.items():
        assert torch.equal(states[0][name], states[1][name]), name
        if tensor.is_floating_point():
            torch.testing.assert_close(states[0][name], tensor, atol=3e-4, rtol=1e-3, msg=name)
            moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-3  # the tolerance is far below what was learnt


def test_a_checkpoint_cut_short_is_not_whole(tmp_path):
    import torch
    from safetensors.torch import save_file

    from facemllm.training import checkpoint

    assert not checkpoint.whole(tmp_path)
    save_file({"weight": torch.zeros(64)}, tmp_path / checkpoint.TENSORS)
    assert not checkpoint.whole(tmp_path)
    (tmp_path / checkpoint.STATE).write_text("{}")
    assert checkpoint.whole(tmp_path)
    data = (tmp_path / checkpoint.TENSORS).read_bytes()
    (tmp_path / checkpoint.TENSORS).write_bytes(data[:-8])
    assert not checkpoint.whole(tmp_path)
