"""Every family is trained by the same loop: what a stage declares changes and nothing else, packed rows are single
questions, a resumed run ends with the same bytes. The commonest here, all under `make test-families`."""

import copy
from functools import cache

import numpy as np
import pytest
import torch

from facemllm import settings
from facemllm.errors import UserError
from facemllm.model.families import family_of
from facemllm.model.pretrained import load_model
from facemllm.tables import CONVERSATIONS, TableWriter, open_table
from facemllm.train.corpus import FaceDataset
from facemllm.train.data import read_turns, tokenise
from facemllm.train.dataloader import DataLoader
from facemllm.train.loop import run_stage
from facemllm.train.loss import StepLoss
from facemllm.train.pixels import pixel_cache
from tests.families import SIDES, all_families, small
from tests.training_example import assert_same_gradients, conversation, stage, stage_run, trains

MODES = {
    "projector": trains(projector="full"),
    "adapters": trains(projector="full", language="lora"),
    "everything": trains(tower="full", projector="full", embeddings="full", language="full"),
}


class Learner:
    """A small model of a family, and conversations of our table as it reads them."""

    def __init__(self, name, folder):
        self.settings = settings.load("laptop")
        self.model, self.processor = load_model(small(name, folder / name), image_size=SIDES[name])
        self.family = family_of(self.model.config, self.processor)
        with TableWriter(folder / "table", CONVERSATIONS) as writer:
            writer.write(conversation(number, "train") for number in range(12))
        table = open_table(folder / "table", CONVERSATIONS)
        corpus = tokenise(read_turns(table, "train"), self.family.frame)
        self.dataset = FaceDataset(corpus, pixel_cache(table, self.family, folder / "cache"))

    def run(self, plan, **options):
        given = {key: options.pop(key) for key in list(options) if key in ("resume", "save", "log")}
        run = stage_run(plan, self.settings, **options)
        return run_stage(run, copy.deepcopy(self.model), self.processor, self.dataset, **given)

    def gradients(self, plan):
        """Loss and gradients of the first step."""
        model, run = copy.deepcopy(self.model), stage_run(plan, self.settings)
        [batch] = DataLoader(run, model, self.processor, self.dataset).batches(0)
        value = StepLoss(run, model, self.processor, self.dataset)(batch)
        value.loss.backward()
        return float(value.loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def learner(tmp_path_factory):
    torch.set_num_threads(1)
    return cache(lambda name: Learner(name, tmp_path_factory.mktemp(name)))


def plan(**changes):
    return stage(**{"steps": 2, "batch_images": 4, "learning_rate": 1e-2} | changes)


@all_families()
@pytest.mark.parametrize("mode", MODES)
def test_a_stage_changes_what_it_declares_and_nothing_else(learner, name, mode):
    toy = learner(name)
    module_of, before = toy.family.module_of(toy.model), toy.model.state_dict()
    after = toy.run(plan(trains=MODES[mode])).model.state_dict()
    assert set(after) == set(before)
    changed = {module_of(key) for key in before if not torch.equal(before[key], after[key])}
    assert changed == {module for module, how in MODES[mode].items() if how != "frozen"}


@all_families()
def test_questions_that_share_a_row_teach_what_each_does_alone(learner, name, monkeypatch):
    toy = learner(name)
    if not toy.family.packs:
        return
    packed_loss, packed = toy.gradients(plan(trains=MODES["everything"]))
    monkeypatch.setattr(type(toy.family), "packs", False)
    loss, single = toy.gradients(plan(trains=MODES["everything"]))
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert_same_gradients(single, packed, atol=1e-4, rtol=1e-3)


@all_families()
def test_a_resumed_run_ends_with_the_same_bytes(learner, name, tmp_path):
    toy, chosen = learner(name), plan(trains=MODES["adapters"], steps=3)
    whole = toy.run(chosen, checkpoint_every=2, save=lambda step, checkpoint: checkpoint.write(tmp_path))
    resumed = toy.run(chosen, checkpoint_every=2, resume=tmp_path)
    assert resumed.resumed_from == 2
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[key], tensor), key


@all_families()
def test_features_are_kept_where_all_that_makes_them_is_frozen(learner, name, tmp_path):
    toy = learner(name)
    frozen = trains(language="full", projector="frozen" if "projector" in toy.family.feature_parts else "full")
    chosen, losses = plan(trains=frozen, augment=False, steps=4), ([], [])
    for into, cached in zip(losses, (False, True), strict=True):
        toy.run(chosen, cache=tmp_path, feature_cache=cached, log=lambda _, m, into=into: into.append(m["loss"]))
        assert bool(list(tmp_path.glob("features-*"))) == cached
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    moved = plan(trains=trains(projector="full", tower="full"), augment=False, steps=4)
    toy.run(moved, cache=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_small_pictures_are_for_towers_of_any_size(learner):
    with pytest.raises(UserError, match="small_pictures"):
        learner("qwen2_5_vl").run(plan(small_pictures=0.5))
    assert np.isfinite(learner("llava").run(plan()).final_loss)
