"""Published models that cannot be used: each is refused in one line that says what is wrong with it."""

import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from facemllm.model.families import Generic, family_of
from facemllm.model.pretrained import load_model
from facemllm.model.reader import Reader
from tests.conftest import change_json
from tests.families import LANGUAGE, SIDES, small, tokenizer
from tests.refusing import refuses


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small("qwen2_5_vl", tmp_path_factory.mktemp("base") / "base")


@pytest.fixture
def copy(base, tmp_path):
    return shutil.copytree(base, tmp_path / "copy")


def config(name="config.json", part=None, **changes):
    return lambda copy: change_json(copy / name, lambda c: (c[part] if part else c).update(changes))


def without_template(copy):
    for file in copy.glob("chat_template*"):
        file.unlink()
    change_json(copy / "tokenizer_config.json", lambda c: c.pop("chat_template", None))


def without_end(copy):
    change_json(copy / "tokenizer_config.json", lambda c: c.pop("eos_token"))


def fewer_words(copy):
    """The embeddings of fewer words than the tokenizer knows."""
    file = copy / "model.safetensors"
    tensors = {name: t[:290].clone() if t.shape[:1] == (312,) else t for name, t in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    change_json(copy / "config.json", lambda c: c["text_config"].update(vocab_size=290))


@pytest.mark.parametrize(
    ("damage", "side", "words"),
    [
        (without_template, 112, ["no chat template", "chat_template.jinja"]),
        (without_end, 112, ["no end token", "eos_token"]),
        (config(quantization_config={"quant_method": "awq"}), 112, ["quantised"]),
        (fewer_words, 112, ["tokenizer knows 307 words", "embeddings 290", "resized"]),
        (
            config(part="text_config", max_position_embeddings=20),
            112,
            ["tokens", "reads 20", "max_position_embeddings"],
        ),
        (lambda copy: None, 100, ["model.image_size 100", "no multiple of 28"]),
        (lambda copy: None, 28, ["784 pixels", "leaves 3136 to"]),
        (config(image_token_id=9), 112, ["image token <|image_pad|>", "config.json"]),
        (config(part="vision_config", spatial_merge_size=1), 112, ["merger"]),
    ],
)
def test_what_cannot_be_used_is_named(copy, damage, side, words):
    damage(copy)
    message = refuses(None, load_model, copy, image_size=side)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_processor_of_one_size_wants_pictures_no_smaller(tmp_path):
    folder = small("gemma3", tmp_path / "gemma3")
    refuses("32 pixels wide, and model.image_size is 31; set model.image_size: 32", load_model, folder, image_size=31)
    load_model(folder, image_size=64)


def test_a_model_of_text_is_refused(tmp_path):
    words = tokenizer(["<s>", "</s>"], eos="</s>", template="{{ messages }}")
    words.save_pretrained(tmp_path)
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(words), **LANGUAGE)).save_pretrained(tmp_path)
    refuses("llama reads no images", load_model, tmp_path)


def test_code_of_a_base_is_never_run(copy, tmp_path):
    mark = tmp_path / "ran"
    for name in ("configuration_own.py", "modeling_own.py", "processing_own.py"):
        (copy / name).write_text(f"open({str(mark)!r}, 'w').close()\nclass Own: pass\n")
    kinds = {"AutoConfig": "configuration_own.Own", "AutoModelForImageTextToText": "modeling_own.Own"}
    kinds["AutoProcessor"] = "processing_own.Own"
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        change_json(copy / name, lambda c: c.update(auto_map=kinds))
    load_model(copy, image_size=112)  # what transformers has itself needs no code of the checkpoint's
    change_json(copy / "config.json", lambda c: c.update(model_type="own"))
    refuses("own needs code of its own", load_model, copy)
    assert not mark.exists()


def test_the_side_of_pictures_is_kept_with_the_model(base, tmp_path):
    model, processor = load_model(base, image_size=168)
    assert family_of(model.config, processor).image_count == 36
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = load_model(tmp_path)
    assert family_of(again.config, processor).side == 168
    reader = Reader.open(tmp_path)
    assert reader.prepared == (168, 168, 3)
    assert reader.pixels(np.zeros((90, 60, 3), np.uint8)).shape == (168, 168, 3)


def test_a_family_without_an_adapter_takes_the_plain_path(base, monkeypatch):
    from facemllm.model import families

    known, processor = load_model(base, image_size=SIDES["qwen2_5_vl"])
    own = family_of(known.config, processor)
    monkeypatch.setattr(families, "FAMILIES", {})
    generic = family_of(known.config, processor)
    assert type(generic) is Generic
    assert not generic.packs
    assert generic.unpackable == "no adapter says how the attention of qwen2_5_vl takes a block mask"
    assert set(generic.lora_targets(known)) == set(own.lora_targets(known))
    for name, _ in known.named_parameters():
        if ".merger." not in name:
            assert generic.module_of(known)(name) == own.module_of(known)(name), name
    with torch.no_grad():
        assert generic.features(known, generic.inputs(np.zeros((2, 112, 112, 3), np.uint8))).shape == (2, 16, 32)
