"""The segmentation and knowledge branches: what they add, what they leave alone, and transformers' own ways of use."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from facemllm import settings
from facemllm.core import cost
from facemllm.model.branches import NO_MAP, NO_WORD, KnowledgeBranch, SegmentationBranch
from facemllm.model.face_mllm import FaceMllmForConditionalGeneration, Graph, extend
from facemllm.model.forward import tower_features, visual_tokens
from facemllm.model.inputs import face_map, without
from facemllm.model.pretrained import save_model
from facemllm.model.tiny import build_tiny
from tests.refusing import refuses
from tests.training_example import prompt, spread

TEXTS = ["Is there a beard?", "a woman with brown hair and glasses; head turned left.", "Describe this face."]
NAMES, WORDS = ("hat", "glasses", "beard"), ("with a hat", "glasses", "a beard")
EARRINGS = 15
MODES = ["append", "add"]
KNOWS = "model.knowledge.enabled=true"


def make(*overrides, withheld=()):
    chosen = settings.load("laptop", list(overrides)).model
    model, processor = build_tiny(chosen, TEXTS, ["yes", "no"], seed=3)
    graph = Graph(NAMES, WORDS, np.array([[0.8, 0.2, 0.0], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]]))
    model, processor = extend(model, processor, chosen, graph, withheld, seed=3)
    return spread(model), processor


@pytest.fixture(scope="module", params=MODES)
def both(request):
    torch.set_num_threads(1)
    return make(f"model.segmentation.mode={request.param}", KNOWS)


@pytest.fixture(scope="module")
def appended():
    torch.set_num_threads(1)
    return make("model.segmentation.mode=append", KNOWS)


def faces(count):
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (96, 96, 3), dtype=np.uint8)) for _ in range(count)]
    return pictures, [np.kron(generator.integers(0, 19, (6, 6)), np.ones((16, 16))).astype(np.uint8) for _ in pictures]


QUESTIONS = ["Is there a beard?", "Describe this face.", "Is she a woman with glasses?"]


def inputs_of(processor, pictures, maps, questions=QUESTIONS):
    texts = [prompt(processor, question) for question in questions[: len(pictures)]]
    return processor(images=pictures, text=texts, segmentation=maps, return_tensors="pt", padding=True)


def last_logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def written(model, inputs, **options):
    # an untrained model may write the image's token, which without a cache would stand for one image more
    options |= {"pad_token_id": 0, "suppress_tokens": [model.config.image_token_id]}
    ids = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)
    return ids[:, inputs["input_ids"].shape[1] :]


def ended(rows):
    """Rows of ids up to their end token, the way they compare whatever the padding."""
    return [[i for i in row.tolist() if i > 2] for row in rows]


@pytest.mark.parametrize("mode", ["none", *MODES])
@pytest.mark.parametrize("knows", [False, True])
def test_saved_and_loaded_by_transformers_the_logits_are_the_same(mode, knows, tmp_path):
    model, processor = make(f"model.segmentation.mode={mode}", f"model.knowledge.enabled={str(knows).lower()}")
    expected = LlavaForConditionalGeneration if mode == "none" and not knows else FaceMllmForConditionalGeneration
    assert type(model) is expected
    pictures, maps = faces(2)
    shown = [maps[0], None] if mode != "none" else None
    inputs = inputs_of(processor, pictures, shown)
    before = last_logits(model, inputs)
    save_model(model, processor, tmp_path / "model")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    assert type(again) is expected
    same = inputs_of(AutoProcessor.from_pretrained(tmp_path / "model"), pictures, shown)
    assert torch.equal(same["input_ids"], inputs["input_ids"])
    assert torch.equal(last_logits(again, same), before)


def test_a_map_is_seen_and_no_map_is_a_token_of_its_own(both):
    model, processor = both
    pictures, maps = faces(2)
    none = last_logits(model, inputs_of(processor, pictures, None))
    assert torch.equal(last_logits(model, inputs_of(processor, pictures, [None, None])), none)
    some = last_logits(model, inputs_of(processor, pictures, [maps[0], None]))
    assert (some[0] - none[0]).abs().max() > 1e-3
    torch.testing.assert_close(some[1], none[1], atol=1e-4, rtol=1e-4)


def test_the_token_of_no_map_is_learned():
    branch = SegmentationBranch(side=32, patch=8, width=16, layers=1, heads=2, tokens=10, output=24)
    maps = torch.zeros(2, 96, 96, dtype=torch.uint8)
    branch(maps).sum().backward()
    assert branch.absent.grad.abs().max() == 0
    maps[1] = NO_MAP
    tokens = branch(maps)
    assert torch.equal(tokens[1], branch.absent.expand(10, -1))
    branch.zero_grad()
    tokens[1].sum().backward()
    assert torch.equal(branch.absent.grad, torch.full((24,), 10.0))
    assert branch.classes.weight.grad.abs().max() == 0


def test_a_left_padded_batch_answers_as_single_rows(both):
    model, processor = both
    pictures, maps = faces(3)
    shown = [maps[0], None, maps[2]]
    together = inputs_of(processor, pictures, shown)
    assert (together["attention_mask"] == 0).any()
    singles = [inputs_of(processor, *([one] for one in row)) for row in zip(pictures, shown, QUESTIONS, strict=True)]
    logits = last_logits(model, together)
    for row, single in enumerate(singles):
        torch.testing.assert_close(logits[row], last_logits(model, single)[0], atol=5e-4, rtol=1e-3)
    texts = ended(written(model, together))
    assert texts == [ended(written(model, single))[0] for single in singles]


def test_generation_is_the_same_with_and_without_cache(both):
    model, processor = both
    pictures, maps = faces(3)
    for shown in (None, [maps[0], None, maps[2]]):
        inputs = inputs_of(processor, pictures, shown)
        assert torch.equal(written(model, inputs), written(model, inputs, use_cache=False))


def test_beams_and_several_answers_keep_each_row_with_its_map(appended):
    model, processor = appended
    pictures, maps = faces(3)
    shown = [maps[0], None, maps[2]]
    beams = {"num_beams": 2, "num_return_sequences": 2}
    together = ended(written(model, inputs_of(processor, pictures, shown), **beams))
    assert len(together) == 6
    for row in range(3):
        single = inputs_of(processor, [pictures[row]], [shown[row]], [QUESTIONS[row]])
        assert ended(written(model, single, **beams)) == together[2 * row : 2 * row + 2]


def test_classes_are_looked_up_and_one_that_is_unknown_is_background():
    branch = SegmentationBranch(side=8, patch=4, width=16, layers=0, heads=2, tokens=4, output=16)
    maps = torch.randint(0, 19, (2, 8, 8), dtype=torch.uint8)
    maps[1, 3, 3] = 77
    looked_up = branch.classes(torch.where(maps < 19, maps, 0).long())
    patches = torch.stack([looked_up[:, r : r + 4, c : c + 4].flatten(1) for r in (0, 4) for c in (0, 4)], dim=1)
    expected = branch.projector(branch.norm(branch.patches(patches) + branch.places))
    torch.testing.assert_close(branch(maps), expected)
    expected.sum().backward()
    gradient = branch.classes.weight.grad.clone()
    branch.classes.weight.grad = None
    branch(maps).sum().backward()
    torch.testing.assert_close(branch.classes.weight.grad, gradient)


def test_what_the_language_model_sees_stands_in_order():
    pixels, maps = torch.randn(2, 3, 96, 96), torch.randint(0, 19, (2, 96, 96), dtype=torch.uint8)
    outputs = {}
    for mode in MODES:
        model, _ = make(f"model.segmentation.mode={mode}", KNOWS)
        with torch.no_grad():
            features = tower_features(model, pixels)
            plain = model.model.multi_modal_projector(features)
            drawn = model.model.segmentation(maps)
            outputs[mode] = visual_tokens(model, features, maps)
            features = model.get_image_features(pixel_values=pixels, segmentation=maps).pooler_output
            torch.testing.assert_close(torch.stack(list(features)), outputs[mode].tokens_BND)
        visual = torch.cat([plain, drawn], 1) if mode == "append" else plain + drawn
        torch.testing.assert_close(torch.cat(outputs[mode].views, 1), visual)
        assert len(outputs[mode].views) == (2 if mode == "append" else 1)
        torch.testing.assert_close(outputs[mode].tokens_BND[:, : visual.shape[1]], visual)
        assert outputs[mode].tokens_BND.shape[1] == visual.shape[1] + 4
        assert outputs[mode].scores_BA.shape == (2, 3)
        assert model.model.additional_tokens == (14 if mode == "append" else 4)


def test_bfloat16_is_near_float32():
    model, processor = make("model.segmentation.mode=append", KNOWS)
    pictures, maps = faces(2)
    inputs = inputs_of(processor, pictures, [maps[0], None])
    with torch.no_grad():
        pixels, drawn = inputs["pixel_values"], inputs["segmentation"]
        exact = visual_tokens(model, tower_features(model, pixels), drawn)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = visual_tokens(model, tower_features(model, pixels), drawn)
        rounded_model = model.to(torch.bfloat16)
        rounded = visual_tokens(rounded_model, tower_features(rounded_model, pixels.bfloat16()), drawn)
        written(rounded_model, {**inputs, "pixel_values": pixels.bfloat16()})
    for other in (mixed, rounded):
        assert (other.scores_BA - exact.scores_BA).abs().max() < 0.15
        error = (other.tokens_BND.float() - exact.tokens_BND).norm() / exact.tokens_BND.norm()
        assert error < 0.05
    assert mixed.scores_BA.dtype == rounded.scores_BA.dtype == torch.float32


def test_withheld_classes_never_reach_the_branch():
    _, processor = make("model.segmentation.mode=append", withheld=(EARRINGS,))
    ear, skin = 8, 1
    bare = np.full((96, 96), skin, np.uint8)
    bare[40:56, 20:28] = ear
    worn = bare.copy()
    worn[54:60, 22:26] = EARRINGS
    pictures, _ = faces(1)
    given = {"images": pictures, "text": processor.image_token, "return_tensors": "pt"}
    shown = [processor(**given, segmentation=[drawn])["segmentation"] for drawn in (bare, worn)]
    assert not any(EARRINGS in one for one in shown)
    assert (shown[0] != shown[1]).float().mean() < 0.003
    assert EARRINGS in face_map(worn, processor.image_processor)
    assert not without(np.full((4, 4), EARRINGS, np.uint8), [EARRINGS]).any()


@pytest.mark.parametrize(
    ("maps", "words"),
    [
        ([np.full((8, 8), 19, np.uint8)], "below 19"),
        ([np.zeros((8, 8, 3), np.uint8)], "one a pixel"),
        ([np.zeros((8, 8), np.int64)], "one a pixel"),
        ([b"no picture"], "no readable PNG"),
        ([Image.new("RGB", (8, 8))], "class numbers"),
        ([np.zeros((8, 8), np.uint8)] * 2, "2 segmentation maps for 1 images"),
    ],
)
def test_what_is_no_map_or_one_too_many_is_refused(appended, maps, words):
    _, processor = appended
    pictures, _ = faces(1)
    refuses(words, processor, images=pictures, text=processor.image_token, segmentation=maps, return_tensors="pt")


def small_graph(kind=torch.float64):
    torch.manual_seed(0)
    branch = KnowledgeBranch(names=("a", "b", "c"), words=2, width=4, layers=2, prompt_tokens=2).to(kind)
    branch.words.copy_(torch.tensor([[1, 2], [3, NO_WORD], [2, 4]]))
    return branch


def test_the_graph_against_numbers_worked_out_by_hand():
    graph = np.array([[0.8, 0.2, 0.0], [0.2, 0.8, 0.0], [0.0, 0.2, 0.8]])
    branch = small_graph()
    branch.graph.copy_(torch.from_numpy(graph))
    words = np.random.default_rng(1).normal(size=(5, 4))
    text = np.stack([(words[1] + words[2]) / 2, words[3], (words[2] + words[4]) / 2])
    text = (text - text.mean(1, keepdims=True)) / np.sqrt(text.var(1, keepdims=True) + 1e-5)
    first, second = (layer.weight.detach().numpy() for layer in branch.layers)
    hidden = graph @ text @ first.T
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    refined = branch.refined(torch.from_numpy(words)).detach().numpy()
    np.testing.assert_allclose(refined, graph @ hidden @ second.T, atol=1e-12)


def test_gradients_of_graph_and_scores_by_finite_differences():
    branch = small_graph()
    branch.graph.copy_(torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]]))
    visual = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    words = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = [parameter for name, parameter in branch.named_parameters() if name not in ("queries", "prompt")]

    def scores(visual, words, *weights):
        refined = branch.refined(words)
        return branch.visual(visual.mean(1)) @ refined.T * 0.5 + branch.prior

    assert torch.autograd.gradcheck(scores, (visual, words, *weights))
    torch.testing.assert_close(branch(visual, words)[0], scores(visual, words, *weights).float(), atol=1e-6, rtol=1e-6)


def test_the_prompt_trains_the_graph_and_leaves_the_scores_alone():
    branch = small_graph(torch.float32)
    visual = torch.randn(2, 3, 4, requires_grad=True)
    _, prompt = branch(visual, torch.randn(5, 4))
    (prompt**2).sum().backward()
    assert branch.prior.grad is None
    assert visual.grad is None
    assert all(parameter.grad is None for parameter in branch.visual.parameters())
    assert all(layer.weight.grad.abs().max() > 0 for layer in branch.layers)
    branch.zero_grad(set_to_none=True)
    branch(visual, torch.randn(5, 4))[0].sum().backward()
    assert branch.queries.grad is None
    assert branch.prior.grad.abs().max() > 0


def test_what_cannot_be_extended_is_refused():
    graph = Graph(NAMES, WORDS, np.eye(3))
    chosen, maps = (settings.load("laptop", [one]).model for one in (KNOWS, "model.segmentation.mode=add"))
    model, processor = build_tiny(chosen, TEXTS, ["yes", "no"], seed=3)
    refuses(r"model\.knowledge", extend, model, processor, chosen, None, (), seed=0)
    extended = extend(model, processor, chosen, graph, (), seed=0)
    refuses("FaceMllmForConditionalGeneration", extend, *extended, chosen, graph, (), seed=0)
    model, processor = build_tiny(maps, TEXTS, ["yes", "no"], seed=3)
    processor.num_additional_image_tokens = 2
    said = r"mode: add needs .* the 11 tokens of this tower are neither a square"
    refuses(said, extend, model, processor, maps, None, (), seed=0)


def test_the_encoder_of_maps_costs_little_beside_the_tower(appended):
    model, _ = appended
    with torch.no_grad():
        with cost.operations() as tower:
            tower_features(model, torch.randn(4, 3, 96, 96))
        with cost.operations() as encoder:
            model.model.segmentation(torch.zeros(4, 96, 96, dtype=torch.uint8))
    assert encoder.get_total_flops() < 0.05 * tower.get_total_flops()
