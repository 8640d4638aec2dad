"""README's snippet on results of every family, run as it stands; and models of others, opened as a base is and asked as
a user of transformers would."""

import re
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForImageTextToText

from facemllm.asking import local
from facemllm.asking.requests import JobStopped, TooLong
from facemllm.model import open_processor
from facemllm.model.inference import Predictor
from facemllm.model.pretrained import load_model, save_model
from tests.families import PALIGEMMA, SIDES, all_families, small

QUESTION, LONGEST = "Is there a beard?", 20


@pytest.fixture
def face(tmp_path):
    path = tmp_path / "face.jpg"
    Image.effect_noise((90, 60), 80).convert("RGB").save(path)
    return path


def snippet() -> str:
    found = re.search(r"```python\n(from facemllm\.model import .*?)```", Path("README.md").read_text("utf-8"), re.S)
    assert found
    return found[1].replace('".facemllm/store/DIGEST"', '"result"')


@all_families()
def test_readmes_snippet_answers_as_the_predictor_does(name, face, tmp_path, monkeypatch, capsys):
    base = small(name, tmp_path / "base")
    save_model(*load_model(base, image_size=SIDES[name]), tmp_path / "result")
    code = snippet()
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out.strip()
    said = Predictor.load("result").generate(Image.open(face), QUESTION, LONGEST)
    assert said
    assert printed.endswith(said)


@all_families()
def test_a_model_of_others_is_asked_as_a_user_of_transformers_would(name, face, tmp_path):
    folder = small(name, tmp_path / "theirs")
    picture, chat = Image.open(face).convert("RGB"), local.chat_about(1, QUESTION)
    ((said, asked, _),) = local.written(*local._loaded(folder), [chat], [[picture]], do_sample=False, max_new_tokens=9)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), open_processor(folder)
    chat[0]["content"][0]["image"] = picture
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(chat, **options)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=9)[0, inputs["input_ids"].shape[1] :]
    assert said == processor.decode(ids, skip_special_tokens=True)
    assert asked == inputs["input_ids"].shape[1]


def test_a_template_that_writes_the_start_token_gets_no_second_one(tmp_path):
    network, processor = local._loaded(small("gemma3", tmp_path / "theirs"))
    words, start = processor.tokenizer, ("<bos>", processor.tokenizer.bos_token_id)
    words.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[start])
    assert words("beard")["input_ids"][0] == words.bos_token_id
    picture, chat = Image.new("RGB", (32, 32)), local.chat_about(1, QUESTION)
    ((_, asked, _),) = local.written(network, processor, [chat], [[picture]], do_sample=False, max_new_tokens=1)
    chat[0]["content"][0]["image"] = picture
    wanted = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert asked == len(wanted["input_ids"][0])


def test_a_model_of_others_is_refused_as_a_base_is(tmp_path):
    folder = small("gemma3", tmp_path / "theirs")
    file = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if ".mlp." not in name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(JobStopped, match="weights are missing, the first"):
        local._loaded(folder)


def test_a_question_that_is_more_than_the_model_reads_is_too_long(tmp_path):
    network, processor = local._loaded(small("llava", tmp_path / "theirs"))
    blank = Image.new("RGB", (32, 32))
    with pytest.raises(TooLong, match=r"more than the 1,024 tokens that the model reads"):
        local.written(network, processor, [local.chat_about(1, "beard " * 1000)], [[blank]], max_new_tokens=1)


def test_the_chat_template_that_the_docs_give_for_paligemma_is_the_one_that_is_tested():
    found = re.search(r"```jinja\n\s*(.*?)\s*```", Path("docs/bases.md").read_text("utf-8"), re.S)
    assert found
    assert found[1] == PALIGEMMA.replace("IMAGE", "<image>")
