"""What a step sees, and that packing, several faces a row and micro-batches change neither loss nor gradients."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from facemllm.model.branches import NO_MAP
from facemllm.model.forward import PADDING, PREFIX, tower_features, visual_tokens
from facemllm.model.inputs import normalise
from facemllm.train import loss as loss_module
from facemllm.train.augment import apply_to_maps
from facemllm.train.loss import StepLoss, token_losses
from facemllm.train.packing import fitted, pack, tightest
from tests.refusing import refuses
from tests.training_example import assert_same_gradients, stage, trains

FROZEN = trains(projector="full", embeddings="full", language="full")


def packed(toy, turns, mirrored=None, corpus=None, **options):
    mirrored = np.zeros(len(turns), bool) if mirrored is None else mirrored
    return pack(corpus or toy.corpus, turns, mirrored, toy.frame.prefix_ids, toy.frame.image_token_id, **options)


def test_a_plan_depends_on_the_step_alone(toy):
    samplers = [toy.sampler(stage()) for _ in range(2)]
    for step in (7, 0, 3):
        one, other = samplers[0].plan(step), samplers[1].plan(step)
        assert one.rows.tolist() == other.rows.tolist()
        assert [t.tolist() for t in one.turns] == [t.tolist() for t in other.turns]
        assert (one.changes.mirror == other.changes.mirror).all()
        assert (one.withheld == other.withheld).all()
    epoch = [row for step in range(16) for row in samplers[0].plan(step).rows.tolist()]
    assert sorted(epoch[:32]) == list(range(32))
    assert epoch[:32] != epoch[32:64]
    assert samplers[0].plan(0).rows.tolist() != toy.sampler(stage(), name="other").plan(0).rows.tolist()


def test_turns_are_drawn_by_weight_without_repeats(toy):
    sampler = toy.sampler(stage(tasks={"attributes": 4.0, "head_pose": 1.0}, turns_per_image=1))
    drawn = np.concatenate([t for step in range(200) for t in sampler.plan(step).turns])
    names = np.array(toy.corpus.tasks)[toy.corpus.task[drawn]]
    assert set(names) == {"attributes", "head_pose"}
    assert abs((names == "attributes").mean() - 8 / 9) < 0.03  # two attribute turns of weight 4 against one of 1
    full = toy.sampler(stage(turns_per_image=9)).plan(0)
    assert all(sorted(t.tolist()) == list(range(t.min(), t.min() + 4)) for t in full.turns)


def test_a_turn_that_follows_stays_with_the_turn_before(toy):
    # the third turn of every face depends on the second
    corpus = replace(toy.corpus, follows=np.arange(len(toy.corpus.follows)) % 4 == 2)
    apart, together = toy.corpus.chain_tokens(), corpus.chain_tokens()
    assert together[1] == together[2] == apart[1] + apart[2]
    assert (together[0], together[3]) == (apart[0], apart[3])
    plan = toy.sampler(stage(tasks={"attributes": 1.0}, turns_per_image=1), corpus).plan(0)
    assert all(len(t) == 2 and t[1] == t[0] + 1 for t in plan.turns)
    rows = packed(toy, plan.turns, corpus=corpus)
    own = rows.face[0] != PADDING
    assert set(rows.block[0][own]) == {PREFIX, 0}
    assert rows.position[0][own].tolist() == list(range(own.sum()))


def test_what_follows_is_left_out_from_the_first_turn_of_another_task_on(toy):
    # caption, attributes, attributes, head pose
    corpus = replace(toy.corpus, follows=np.arange(len(toy.corpus.follows)) % 4 > 0)
    drawn = {}
    for tasks in (("caption", "attributes"), ("caption", "head_pose"), tuple(toy.corpus.tasks)):
        sampler = toy.sampler(stage(tasks=dict.fromkeys(tasks, 1.0)), corpus)
        turns = sampler.plan(0).turns
        drawn[tasks] = {len(t) for t in turns}
        asked = np.isin(np.array(corpus.tasks)[corpus.task], tasks)
        needed = corpus.chain_tokens(asked)
        lengths = (corpus.texts.lengths[corpus.prompt] + corpus.texts.lengths[corpus.answer]).max(1)
        assert all(needed[t[0]] == lengths[t].sum() for t in turns)
    assert list(drawn.values()) == [{3}, {1}, {4}]


def test_answer_tokens_are_counted_of_what_a_mirrored_face_is_asked(toy):
    answer, lengths = toy.corpus.answer.copy(), toy.corpus.texts.lengths
    answer[:, 1] = int(lengths.argmax())
    assert lengths[answer[:, 1]].sum() > lengths[answer[:, 0]].sum()
    corpus = replace(toy.corpus, answer=answer)
    plan = toy.sampler(stage(), corpus).plan(0)
    assert plan.changes.mirror.any()
    rows = packed(toy, plan.turns, plan.changes.mirror, corpus)
    assert plan.labels == len(rows.target)


def test_a_task_that_the_table_lacks_is_named_with_those_it_has(toy):
    said = "no conversation has a question of smell; the table has attributes, caption"
    refuses(said, toy.sampler, stage(tasks={"smell": 1.0}))


def test_a_question_too_long_for_the_model_is_left_out_and_told(toy):
    prefix = len(toy.frame.prefix_ids)
    tokens = prefix + toy.corpus.chain_tokens()
    captions = np.array(toy.corpus.tasks)[toy.corpus.task] == "caption"
    limit = int(tokens[captions].min()) - 1
    assert tokens[~captions].max() <= limit
    sampler = toy.sampler(stage(turns_per_image=9), prefix=prefix, limit=limit)
    assert len(sampler.left_out) == len(toy.corpus)
    assert sampler.left_out[0] == ("i0", int(tokens[0]))
    assert not any(captions[t].any() for step in range(8) for t in sampler.plan(step).turns)
    said = rf"every question is longer than the {prefix} tokens .* for image i0"
    refuses(said, toy.sampler, stage(), prefix=prefix, limit=prefix)


def test_rows_are_filled_first_fit_longest_first_to_the_width_with_least_padding():
    lengths = np.array([3, 7, 12, 5, 2])
    assert fitted(lengths, 10) == [[2], [1, 0], [3, 4]]
    assert fitted(lengths, 0) == [[0], [1], [2], [3], [4]]
    lengths = np.array([140] * 6)
    assert tightest(lengths, 256, 4) == ([[n] for n in range(6)], 140)  # 256 would leave 116 of each row empty
    assert tightest(np.array([100, 40, 60, 100]), 256, 4) == ([[0], [3], [2, 1]], 100)
    assert tightest(np.array([100, 40, 60]), 256, 4) == ([[0], [2, 1]], 100)
    assert tightest(lengths, 100, 8) == ([[n] for n in range(6)], 144)
    assert tightest(lengths, 0, 8)[1] == 144
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(20, 200, generator.integers(1, 40))
        rows, width = tightest(lengths, 256, 8)
        assert sorted(face for row in rows for face in row) == list(range(len(lengths)))
        assert max(lengths[row].sum() for row in rows) <= width <= 256
        assert len(rows) * width <= len(fitted(lengths, 256)) * 256
        assert len(rows) * width <= len(lengths) * -(-lengths.max() // 8) * 8


def test_labels_stand_on_answer_and_end_tokens_only(toy):
    rows = packed(toy, [np.array([1, 0]), np.array([4])], row_tokens=512, multiple=1)
    assert len(rows.ids) == 1
    text = toy.processor.tokenizer.decode(rows.target)
    answers = [toy.processor.tokenizer.decode(toy.corpus.texts[toy.corpus.answer[turn, 0]]) for turn in (1, 0, 4)]
    assert text == " ".join(answers)
    assert text.count("</s>") == 3
    # each label is the token that follows in its own block
    flat = {name: getattr(rows, name).reshape(-1) for name in ("ids", "face", "block")}
    for place, target in zip(rows.at, rows.target, strict=True):
        assert flat["ids"][place + 1] == target
        assert flat["face"][place + 1] == flat["face"][place]
        assert flat["block"][place + 1] == flat["block"][place]


class PLAIN:
    """No smoothing of numbers: cross-entropy as torch has it."""

    cross_entropy = staticmethod(lambda logits, target: F.cross_entropy(logits, target, reduction="none"))


def loss_and_gradients(toy, model, turns, rows, **options):
    pixels = torch.from_numpy(np.array(toy.pixels[toy.corpus.pixel_row[rows]]))
    visual = visual_tokens(model, tower_features(model, normalise(pixels, toy.processor.image_processor)))
    p = packed(toy, turns, **options)
    tensors = [torch.from_numpy(a) for a in (p.ids, p.face, p.block, p.position, p.image)]
    states = toy.family.packed(model, visual, *tensors)
    loss = token_losses(toy.family, model, states[torch.from_numpy(p.at)], torch.from_numpy(p.target), PLAIN).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("attention", "row_tokens"), [("sdpa", 0), ("sdpa", 120), ("eager", 1000)])
def test_packed_loss_and_gradients_are_the_sum_of_the_unpacked(toy, attention, row_tokens):
    model = toy.fresh()[0].eval()  # batch statistics would differ; everything else is as in training
    model.set_attn_implementation({"text_config": attention})
    assert model.config.text_config._attn_implementation == attention
    turns = [np.array([0, 1, 3]), np.array([6, 5]), np.array([8, 9, 10, 11])]
    rows = np.array([0, 1, 2])
    shared = packed(toy, turns, row_tokens=row_tokens)
    assert (len(shared.ids) < len(turns)) == (row_tokens > 0)
    whole, gradients = loss_and_gradients(toy, model, turns, rows, row_tokens=row_tokens)
    total, summed = torch.tensor(0.0), {}
    for row, chosen in zip(rows, turns, strict=True):
        for turn in chosen:
            loss, parts = loss_and_gradients(toy, model, [np.array([turn])], np.array([row]))
            total = total + loss
            for name, gradient in parts.items():
                summed[name] = summed.get(name, 0) + gradient
    torch.testing.assert_close(whole, total, atol=0, rtol=1e-5)
    assert_same_gradients(summed, gradients)


@pytest.mark.parametrize("options", [{"row_tokens": 400}, {"micro_images": 2}, {"micro_images": 4, "row_tokens": 400}])
def test_rows_and_micro_batches_change_neither_loss_nor_gradients(full_toy, options):
    plan = stage(trains=trains(**{**FROZEN, "segmentation": "full", "knowledge": "full"}), batch_images=7)
    model = full_toy.fresh()[0].eval()
    one, gradients = full_toy.gradients(model, plan, full_toy.batches(plan))
    batches = full_toy.batches(plan, **options)
    assert len(batches) == -(-7 // options.get("micro_images", 7))
    if options == {"row_tokens": 400}:
        assert len(batches[0].packed["ids"]) < 7
    other, parts = full_toy.gradients(model, plan, batches)
    terms = 4  # the rest of a report are sums over answers and counts of tokens
    torch.testing.assert_close(other[:terms], one[:terms], atol=1e-6, rtol=1e-6)
    assert_same_gradients(gradients, parts)


def test_a_rare_class_weighs_more_in_the_loss(toy):
    plan = stage(class_weights=0.5, number_smoothing=0.0, augment=False)
    model = toy.fresh()[0].eval()
    said = [toy.processor.tokenizer.decode(toy.corpus.texts[answer]) for answer in toy.corpus.answer[:, 0]]
    weight = np.ones(len(said))
    for place in (1, 2):  # of each face's four questions, those answered by a class
        rare = np.array([said[place::4].count(one) for one in said[place::4]]) ** -0.5
        weight[place::4] = rare / rare.mean()
    assert len(set(weight.round(3))) >= 4
    drawn, expected = toy.sampler(plan).plan(0), 0.0
    for row, turns in zip(drawn.rows, drawn.turns, strict=True):
        for turn in turns:
            loss, _ = loss_and_gradients(toy, model, [np.array([turn])], np.array([row]))
            expected += weight[turn] * float(loss) / drawn.labels
    report, _ = toy.gradients(model, plan, toy.batches(plan))
    assert float(report[0]) == pytest.approx(expected, rel=1e-5)


def test_caption_words_are_learnt_beside_answers(toy):
    model = toy.fresh()[0].eval()
    beside, alone = stage(augment=False, caption_words=0.3), stage(augment=False)
    words = stage(augment=False, objective="caption_words", tasks={"caption": 1.0}, turns_per_image=1)
    found = [toy.gradients(model, plan, toy.batches(plan))[0] for plan in (beside, alone, words)]
    share = 0.3 * float(found[2][0])
    expected = [float(found[1][0]) + share, float(found[1][0]), share]
    np.testing.assert_allclose(found[0][:3], expected, rtol=1e-5)
    assert share > 0.1
    assert StepLoss(toy.stage_run(beside), model, toy.processor, toy.dataset).names[2] == "loss/caption_words"


def test_a_face_without_a_caption_misses_no_words(toy):
    model = toy.fresh()[0].eval()
    plan = stage(augment=False, caption_words=0.3)
    (batch,) = toy.batches(plan)
    whole, without = batch.words_BV, batch.words_BV.clone()
    without[0] = 0
    only = torch.zeros_like(whole)
    only[0] = whole[0]
    terms = [toy.gradients(model, plan, [replace(batch, words_BV=bag)])[0][2] for bag in (whole, without, only)]
    assert float(terms[0]) == pytest.approx(float(terms[1] + terms[2]), rel=1e-5)
    corpus = replace(toy.corpus, task=np.where(np.arange(len(toy.corpus.task)) < 4, 1, toy.corpus.task))
    assert toy.corpus.captions().tolist() == toy.corpus.turn_starts[:-1].tolist()
    assert corpus.captions().tolist() == [-1, *toy.corpus.turn_starts[1:-1].tolist()]
    captionless = replace(toy.corpus, tasks=tuple(f"my_{name}" for name in toy.corpus.tasks))
    names = StepLoss(toy.stage_run(plan), model, toy.processor, replace(toy.dataset, corpus=captionless)).names
    assert names == ("loss", "loss/answers")


def test_micro_batches_of_like_length_need_less_padding(toy):
    plan = stage(batch_images=24)
    [whole] = toy.batches(plan)
    parts = toy.batches(plan, micro_images=6)
    assert sum(p.tokens for p in parts) == whole.tokens
    assert sum(p.cells for p in parts) < whole.cells


def test_cross_entropy_in_parts_is_that_of_the_whole(toy, monkeypatch):
    model, plan = toy.fresh()[0].eval(), stage()
    one, gradients = toy.gradients(model, plan, toy.batches(plan))
    monkeypatch.setattr(loss_module, "LOGITS_BYTES", 4 * 5 * model.get_output_embeddings().weight.shape[0])
    other, parts = toy.gradients(model, plan, toy.batches(plan))
    torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)
    assert_same_gradients(gradients, parts)


def test_maps_move_with_the_face_and_withheld_ones_are_none(full_toy):
    plan = stage(batch_images=24)
    [batch] = full_toy.batches(plan)
    model = full_toy.fresh()[0].eval()
    maps = []
    model.model.segmentation.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    full_toy.gradients(model, plan, [batch])
    assert torch.equal(maps[0], apply_to_maps(batch.maps_BSS, batch.changes))
    assert not torch.equal(maps[0], batch.maps_BSS)
    chosen = full_toy.sampler(plan).plan(0)
    none = (batch.maps_BSS == NO_MAP).flatten(1).all(1).numpy()
    absent = (full_toy.dataset.maps[full_toy.corpus.pixel_row[chosen.rows]] == NO_MAP).all((1, 2))
    assert (none == (chosen.withheld | absent)).all()
    assert chosen.withheld.any()
    assert not chosen.withheld.all()
