"""Published models that cannot be used: each is refused in one line that says what is wrong with it."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from facemllm.core.files import content_of
from facemllm.model import template
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


def tensors(change):
    """Other weights, of the same files."""

    def damage(copy):
        file = copy / "model.safetensors"
        save_file(change(load_file(file)), file, metadata={"format": "pt"})

    return damage


def written(name, content):
    """A file of this content, whatever stood there."""

    def damage(copy):
        (copy / name).unlink(missing_ok=True)
        (copy / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def indexed(content):
    """The weights as a shard, and an index of this content, or of every weight and these entries."""

    def damage(copy):
        names = dict.fromkeys(load_file(copy / "model.safetensors"), "a.safetensors")
        (copy / "model.safetensors").rename(copy / "a.safetensors")
        text = content if isinstance(content, str) else json.dumps({"weight_map": names} | content)
        (copy / "model.safetensors.index.json").write_text(text)

    return damage


def token(text):
    """One more special token."""
    more = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

    def add(c):
        c["added_tokens"].append({"id": c["added_tokens"][-1]["id"] + 1, "content": text, **more})

    return lambda copy: change_json(copy / "tokenizer.json", add)


def giving_up(copy):
    """A pattern on which the tokenizer panics."""
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$|(.*.*)*b"}, "behavior": "Isolated", "invert": False}
    change_json(copy / "tokenizer.json", lambda c: c.update(pre_tokenizer=pattern))


def templated(change):
    """Another chat template, made of the one that is there."""
    return lambda copy: (copy / "chat_template.jinja").write_text(change((copy / "chat_template.jinja").read_text()))


def before(text):
    return templated(lambda template: text + template)


def said(text):
    return templated(lambda template: template.replace("{{ c['text'] }}", text))


def piped(name):
    def damage(copy):
        (copy / name).unlink()
        os.mkfifo(copy / name)

    return damage


def linked(name, target):
    def damage(copy):
        (copy / name).unlink(missing_ok=True)
        (copy / name).symlink_to(target)

    return damage


def moved_out(copy):
    (copy / "model.safetensors").rename(copy.parent / "outside.safetensors")
    (copy / "model.safetensors").symlink_to(copy.parent / "outside.safetensors")


def as_folder(name):
    return lambda copy: ((copy / name).unlink(missing_ok=True), (copy / name).mkdir())


def weights_outside(copy):
    """An index that config.json names, and that names a file outside."""
    names = dict.fromkeys(load_file(copy / "model.safetensors"), "../outside.safetensors")
    shutil.copy(copy / "model.safetensors", copy.parent / "outside.safetensors")
    (copy / "x.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    config(transformers_weights="x.safetensors.index.json")(copy)


def pickled(copy):
    torch.save(load_file(copy / "model.safetensors"), copy / "adapter_model.bin")
    config(transformers_weights="adapter_model.bin")(copy)


def with_adapter(copy):
    """One that would hide what the base lacks."""
    tensors(lambda t: {n: v for n, v in t.items() if "mlp" not in n or "visual" in n})(copy)
    (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}))
    low = {f"base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_{x}.weight": x for x in "AB"}
    ranks = {"A": torch.zeros(4, 32), "B": torch.zeros(32, 4)}
    save_file({name: ranks[x] for name, x in low.items()}, copy / "adapter_model.safetensors")


def one_layer_more(t):
    more = {n.replace("layers.1.", "layers.2."): v.clone() for n, v in t.items() if ".layers.1." in n}
    return t | more


DEEP = "[" * 200_000
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(a='xxxxxxxxxxxxxxxx') %}{% for i in range(40) %}{% set n.a = n.a ~ n.a %}{% endfor %}"
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        # weights and code from elsewhere
        (weights_outside, ["transformers_weights", "another file of weights", "remove it"]),
        (pickled, ["transformers_weights", "not followed"]),
        (moved_out, ["model.safetensors is a link out of the folder", "cp -rL"]),
        (linked("chat_template.jinja", "/etc/hostname"), ["chat_template.jinja is a link out of the folder"]),
        (with_adapter, ["adapter_config.json", "merge_and_unload"]),
        (config(attn_implementation="kernels-community/flash-attn"), ["attn_implementation", "never run"]),
        (config(_attn_implementation={"": "kernels-community/flash-attn"}), ["_attn_implementation", "never run"]),
        (config(part="text_config", experts_implementation="a/b"), ["experts_implementation", "never run"]),
        (config(part="text_config", quantization_config={"quant_method": "awq"}), ["quantised", "unquantised"]),
        (config(compression_config={"quant_method": "compressed-tensors"}), ["quantised", "compression_config"]),
        (config(custom_pipelines={"a": {"impl": "own.Own"}}), ["custom_pipelines", "code of its own"]),
        (config(fusion_config={"patch_embeddings": True}), ["fusion_config", "remove it"]),
        (written("shard-00001-model-00001-of-00001.safetensors", b""), ["shard-00001", "distributed checkpoint"]),
        # weights that do not fit
        (tensors(lambda t: {n: v.int() for n, v in t.items()}), ["I32", "F32, F16 or BF16"]),
        (tensors(one_layer_more), ["in no model", "layers.2", "numbers of layers"]),
        (tensors(lambda t: t | {"more.weight": torch.zeros(3)}), ["1 of its weights", "more.weight"]),
        (config(part="text_config", num_hidden_layers=1, layer_types=["full_attention"]), ["in no model", "layers.1"]),
        (config(part="vision_config", depth=1), ["in no model", "visual.blocks.1"]),
        (config(part="vision_config", depth=200_000), ["depth", "200000", "tensors"]),
        (config(part="text_config", vocab_size=2_000_000_000), ["config.json", "parameters", "files hold"]),
        (config(part="text_config", hidden_size=10**7), ["config.json", "parameters", "files hold"]),
        (config(part="text_config", num_attention_heads=0), ["no model can be made by its config.json"]),
        # files that are none
        (written("config.json", DEEP), ["config.json is nested too deep"]),
        (written("config.json", "[]"), ["config.json holds no JSON object"]),
        (config(model_type=None), ["no config.json that names a model_type"]),
        (config(model_type=["qwen2_5_vl"]), ["no config.json that names a model_type"]),
        (linked("config.json", "/dev/zero"), ["config.json is no regular file"]),
        (linked("config.json", "config.json"), ["config.json is no regular file"]),
        (piped("config.json"), ["config.json is no regular file"]),
        (piped("model.safetensors"), ["model.safetensors is no regular file"]),
        (as_folder(INDEX), [f"{INDEX} is no regular file"]),
        (indexed("[]"), [INDEX, "no JSON object"]),
        (indexed("null"), [INDEX, "no JSON object"]),
        (indexed(DEEP), [INDEX, "nested too deep"]),
        (indexed({"metadata": {}, "weight_map": {}}), [INDEX, "weight_map", "metadata"]),
        (indexed({"metadata": {}, "weight_map": {"a": ["b"]}}), [INDEX, "weight_map"]),
        (indexed({"metadata": {}, "weight_map": {"a": "../copy/a.safetensors"}}), ["../copy", "missing"]),
        (indexed({}), [INDEX, "metadata"]),
        (written("processor_config.json", "[]"), ["processor_config.json holds no JSON object"]),
        (written("tokenizer.json", '{"model": '), ["tokenizer.json is damaged", "fetch it again"]),
        (
            config("processor_config.json", processor_class=["a"]),
            ["opens no processor of", "processor_config.json"],
        ),
        # answers
        (config("generation_config.json", stop_strings=["a"]), ["generation_config.json (stop_strings)"]),
        (config("generation_config.json", repetition_penalty=0.0), ["generation_config.json (repetition_penalty)"]),
        (config("generation_config.json", guidance_scale=3.0), ["generation_config.json (guidance_scale)"]),
        (config("generation_config.json", dola_layers="high"), ["generation_config.json (dola_layers)"]),
        (config("generation_config.json", return_dict_in_generate=True), ["(return_dict_in_generate)"]),
        (config("generation_config.json", num_beams=5000), ["generation_config.json", "num_beams"]),
        (written("generation_config.json", "{"), ["generation_config.json is damaged"]),
        # words
        (token(" "), ["' '", "special token", "tokenizer.json"]),
        (token("e"), ["'e'", "special token", "tokenizer.json"]),
        (giving_up, ["retry-limit", "makes no prompt"]),
        (config("tokenizer_config.json", eos_token=""), ["no end token"]),
        # a chat template
        (before("{{ strftime_now('%S %f') }}"), ["strftime_now", "write a date into it"]),
        (said("{{ c['text'] }}{{ ['a', 'b'] | random }}"), ["cannot render", "random"]),
        (said("{{ c['text'] | replace('beard', 'hat') }}"), ["changes, repeats or leaves out what is said"]),
        (said("{{ c['text'] | upper }}"), ["changes, repeats or leaves out what is said"]),
        (said("{{ c['text'] }}{{ c['text'] }}"), ["changes, repeats or leaves out what is said"]),
        (before("{{ joiner() }}"), ["not write the same text each time"]),
        (before("{% set a = 'a' * 20000000000 %}"), ["MiB of memory"]),
        (before(DOUBLING), ["MiB of memory"]),
        (before(LOOP), ["more than 1 s of processor time"]),
        (before("{{ 'a' * 200000 }}"), ["writes more than", "characters"]),
        (before("{# " + "x" * 200_000 + " #}"), ["characters; at most"]),
    ],
)
def test_what_comes_from_anywhere_is_refused(copy, damage, words, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    monkeypatch.setattr(template, "BYTES", 2**28)
    damage(copy)
    message = refuses(None, load_model, copy, image_size=112)
    assert "\n" not in message
    assert str(copy) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("damage", [piped("model.safetensors"), moved_out, linked("config.json", "/dev/zero")])
def test_what_cannot_be_read_has_no_digest(copy, damage):
    damage(copy)
    refuses("model.safetensors is a link|is no regular file", content_of, str(copy), "model.base")


def test_a_snapshot_of_the_hub_is_read_from_its_blobs(base, tmp_path):
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "1f"
    snapshot.mkdir(parents=True)
    shutil.copytree(base, cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    load_model(snapshot, image_size=112)
    assert content_of(str(snapshot), "model.base") == "1f"


def test_a_model_may_ask_for_a_penalty_and_beams(copy):
    config("generation_config.json", repetition_penalty=1.05, num_beams=2)(copy)
    load_model(copy, image_size=112)


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
