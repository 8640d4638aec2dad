"""Checkpoints that are not ours: LLaVA models as transformers writes them, models of parts, and what is refused."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

from facemllm import settings
from facemllm.model.face_mllm import Graph, extend
from facemllm.model.forward import tower_features, visual_tokens
from facemllm.model.inference import Predictor, Query
from facemllm.model.parts import assemble, load_base
from facemllm.model.pretrained import load_model, save_model
from tests.conftest import change_json
from tests.refusing import refuses

TEXT = ["USER: is there a face? ASSISTANT: yes </s>", "a woman with brown hair and glasses", "no beard at all"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
LANGUAGE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
LANGUAGE |= {"num_attention_heads": 3, "num_key_value_heads": 1}


def write_tokenizer(folder, **options):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_language(kind, folder):
    torch.manual_seed(1)
    if kind == "qwen2":
        words = write_tokenizer(folder, eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML)
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=words, tie_word_embeddings=True, **LANGUAGE))
    else:
        words = write_tokenizer(folder)
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=words, tie_word_embeddings=kind == "smollm", **LANGUAGE))
    model.save_pretrained(folder)
    return folder


def write_tower(kind, folder):
    torch.manual_seed(2)
    if kind == "siglip":
        hf.SiglipVisionModel(hf.SiglipVisionConfig(image_size=32, patch_size=8, **TOWER)).save_pretrained(folder)
        hf.SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    else:
        vision = hf.CLIPVisionConfig(image_size=32, patch_size=8, **TOWER)
        if kind == "clip_pair":
            text = hf.CLIPTextConfig(vocab_size=50, **TOWER)
            hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
        else:
            hf.CLIPVisionModel(vision).save_pretrained(folder)
        square = {"height": 32, "width": 32}
        hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square).save_pretrained(folder)
    return folder


def model_settings(**names):
    return settings.load("laptop", [f"model.{name}={json.dumps(str(value))}" for name, value in names.items()]).model


def logits(model, processor, **more):
    face = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 36, 3), dtype=np.uint8))
    inputs = processor(images=face, text=f"{processor.image_token} is there a face?", return_tensors="pt", **more)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A LLaVA checkpoint in several shards, written by plain transformers."""
    root = tmp_path_factory.mktemp("llava")
    parts = write_tower("clip", root / "tower"), write_language("llama", root / "language")
    model, processor = assemble(*map(str, parts), seed=5)
    model.save_pretrained(root / "llava", max_shard_size="60KB")
    processor.save_pretrained(root / "llava")
    assert len([*(root / "llava").glob("*.safetensors")]) > 2
    return root / "llava"


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


def test_a_published_checkpoint_computes_as_in_plain_transformers(checkpoint):
    plain = LlavaForConditionalGeneration.from_pretrained(checkpoint).eval()
    theirs = logits(plain, AutoProcessor.from_pretrained(checkpoint))
    model, processor = load_base(model_settings(preset="hub", base=checkpoint))
    assert type(model) is LlavaForConditionalGeneration
    assert torch.equal(logits(model.eval(), processor), theirs)
    same, _ = extend(model, processor, settings.load().model, None, (), seed=0)
    assert same is model


@pytest.mark.parametrize("mode", ["append", "add"])
def test_a_published_checkpoint_takes_the_branches(checkpoint, tmp_path, mode):
    chosen = settings.load("laptop", [f"model.segmentation.mode={mode}", "model.knowledge.enabled=true"]).model
    graph = Graph(("hat", "glasses"), ("with a hat", "with glasses"), np.eye(2))
    plain, processor = load_model(checkpoint)
    before = logits(plain.eval(), processor)
    model, processor = extend(plain, processor, chosen, graph, (), seed=0)
    # without what the branches add, the face looks as it did
    tokens, more = (visual_tokens(one, tower_features(one, torch.zeros(1, 3, 32, 32))) for one in (plain, model))
    if mode == "append":
        assert torch.equal(more.tokens_BND[:, : tokens.tokens_BND.shape[1]], tokens.tokens_BND)
    assert torch.equal(logits(plain, AutoProcessor.from_pretrained(checkpoint)), before)
    with_branches = logits(model.eval(), processor)
    save_model(model, processor, tmp_path / "out")
    again, processor = load_model(tmp_path / "out")
    assert torch.equal(logits(again.eval(), processor), with_branches)
    shown = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(shown.eval(), processor), with_branches)


@pytest.mark.parametrize(("tower", "language"), [("clip", "llama"), ("clip_pair", "smollm"), ("siglip", "qwen2")])
def test_parts_become_a_model(tower, language, tmp_path):
    write_tower(tower, tmp_path / "tower")
    write_language(language, tmp_path / "language")
    chosen = model_settings(preset="parts", tower=tmp_path / "tower", language=tmp_path / "language")
    model, processor = load_base(chosen, seed=7)
    assert type(model.eval()) is LlavaForConditionalGeneration
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (language != "llama")
    pixels = torch.randn(2, 3, 32, 32)
    tokens = visual_tokens(model, tower_features(model, pixels)).tokens_BND
    assert tokens.shape == (2, 16, 48)
    torch.testing.assert_close(tokens, torch.stack(list(model.get_image_features(pixels).pooler_output)))

    tokenizer = processor.tokenizer
    ends = ("<|pad|>", "<|im_end|>") if language == "qwen2" else ("<pad>", "</s>")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ends
    predictor = Predictor(model, processor)
    face = np.random.default_rng(1).integers(0, 255, (40, 36, 3), dtype=np.uint8)
    scored = predictor.score([face], [[Query("is there a face?", ("yes", "no"))]])[0][0]
    assert sum(scored.probabilities) == pytest.approx(1)
    predictor.generate(face, "is there a face?", max_new_tokens=4)

    save_model(model, processor, tmp_path / "out")
    again, processor = load_model(tmp_path / "out")
    assert torch.equal(logits(again.eval(), processor), logits(model, processor))
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == tied
    once_more, _ = load_base(chosen, seed=7)
    for name, weight in once_more.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["clip_pair", "siglip"])
def test_a_tower_with_more_layers_than_it_says_is_refused(kind, tmp_path):
    tower, language = write_tower(kind, tmp_path / "tower"), write_language("llama", tmp_path / "language")
    part = (lambda c: c["vision_config"]) if kind == "clip_pair" else (lambda c: c)
    change_json(tower / "config.json", lambda c: part(c).update(num_hidden_layers=2))
    refuses(r"in no model of its config\.json, the first .*layers\.2", assemble, str(tower), str(language), 0)


def test_text_of_a_model_of_parts_is_that_of_its_language_model(tmp_path):
    write_language("qwen2", tmp_path / "language")
    model, processor = assemble(str(write_tower("siglip", tmp_path / "tower")), str(tmp_path / "language"), seed=0)
    ids = torch.tensor([processor.tokenizer("brown hair and glasses")["input_ids"]])
    alone = hf.Qwen2ForCausalLM.from_pretrained(tmp_path / "language")
    with torch.no_grad():
        expected, found = alone(input_ids=ids).logits, model(input_ids=ids).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a hat?"}]}]
    shown = processor.apply_chat_template([*chat, {"role": "assistant", "content": "no"}], tokenize=False)
    assert shown == ("<|im_start|>user\n<image>\nis there a hat?<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n")


def refused(folder, *words):
    message = refuses(None, load_base, model_settings(preset="hub", base=folder))
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_parts_that_do_not_fit_are_refused(tmp_path):
    tower, language = write_tower("clip", tmp_path / "tower"), write_language("llama", tmp_path / "language")

    def unfit(language, match, tower=tower):
        refuses(match, assemble, str(tower), str(language), 0)

    unfit(language, "no vision tower", tower=language)
    unfit(tower, "no tokenizer")
    words = write_tokenizer(tmp_path / "gpt2")
    other = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=words, n_embd=32, n_layer=1, n_head=2))
    other.save_pretrained(tmp_path / "gpt2")
    unfit(tmp_path / "gpt2", "no Llama-shaped decoder")
    write_tokenizer(tmp_path / "granite")
    scaled = hf.GraniteConfig(vocab_size=words, logits_scaling=8.0, **LANGUAGE)
    hf.GraniteForCausalLM(scaled).save_pretrained(tmp_path / "granite")
    unfit(tmp_path / "granite", "changes its logits")
    (tower / "preprocessor_config.json").unlink()
    unfit(language, r"preprocessor_config\.json")


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        (["model.preset=parts"], "takes tower"),
        (["model.preset=parts", "model.tower=a"], "takes language"),
        (["model.preset=hub"], "takes base"),
        (["model.language=a"], "takes language: null"),
    ],
)
def test_a_preset_says_which_names_it_takes(overrides, word):
    refuses(word, settings.load, "laptop", overrides)


def test_a_base_that_is_nowhere(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("nobody/nothing", "model.base: nobody/nothing is no folder, nor a model of the hub")


def test_code_of_a_checkpoint_is_never_run(copy, tmp_path):
    mark = tmp_path / "ran"
    for name in ("configuration_evil.py", "modeling_evil.py"):
        (copy / name).write_text(f"open({str(mark)!r}, 'w').close()\nclass Evil: pass\n")
    mapping = {"AutoConfig": "configuration_evil.Evil", "AutoModelForImageTextToText": "modeling_evil.Evil"}
    change_json(copy / "config.json", lambda c: c.update(auto_map=mapping))
    load_model(copy)  # a family we know needs no code of its own
    change_json(copy / "config.json", lambda c: c.update(model_type="evil"))
    refused(copy, "evil", "auto_map", "never run")
    assert not mark.exists()


def config(file="config", part=None, **changes):
    return lambda copy: change_json(copy / f"{file}.json", lambda c: (c[part] if part else c).update(changes))


processing = partial(config, "processor_config")


def second_shard(change):
    """Other bytes in the second shard, or none at all."""

    def damage(copy):
        file = sorted(copy.glob("*.safetensors"))[1]
        content = change(file.read_bytes())
        file.unlink() if content is None else file.write_bytes(content)

    return damage


def weight(word, change):
    """Another value of the first weight whose name holds a word, or none at all."""

    def damage(copy):
        file = next(f for f in sorted(copy.glob("*.safetensors")) if any(word in name for name in load_file(f)))
        tensors = load_file(file)
        name = min(name for name in tensors if word in name)
        tensors[name] = change(tensors[name])
        save_file({n: t for n, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})

    return damage


def as_pickles(copy):
    for file in copy.glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def without_processor(copy):
    for name in ("processor_config.json", "preprocessor_config.json"):
        (copy / name).unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (as_pickles, ["pickled", "only safetensors"]),
        (second_shard(lambda content: None), ["model-00002-of-", "missing"]),
        (second_shard(lambda content: content[:-100]), ["model-00002-of-", "damaged"]),
        (second_shard(lambda content: b"\xff" * 200), ["model-00002-of-", "damaged"]),
        (second_shard(lambda content: b""), ["model-00002-of-", "damaged"]),
        (lambda copy: next(copy.glob("*.index.json")).write_text("{"), ["model.safetensors.index.json", "damaged"]),
        (weight("language_model", lambda tensor: tensor.to(torch.int8)), ["language_model", "I8", "F32"]),
        (weight("language_model", lambda tensor: tensor.to(torch.float64)), ["language_model", "F64", "F32"]),
        (weight("projector", lambda tensor: None), ["missing", "multi_modal_projector"]),
        (config(quantization_config={"quant_method": "bitsandbytes"}), ["quantised"]),
        (config(part="text_config", hidden_size=96), ["48", "96", "have to match"]),
        (processing(image_token="<picture>"), ["<picture>", "not in its vocabulary"]),
        (config(image_token_index=3), ["<image>", "image_token_index"]),
        (processing(patch_size=4), ["64 image tokens", "makes 16"]),
        (processing(num_additional_image_tokens=0), ["15 image tokens", "makes 16"]),
        (processing(vision_feature_select_strategy="full"), ["17 image tokens", "makes 16"]),
        (processing("image_processor", crop_size={"height": 64, "width": 64}), ["does not fit its vision tower"]),
        (without_processor, ["cannot"]),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused_and_the_fault_named(copy, damage, words):
    damage(copy)
    refused(copy, *words)
