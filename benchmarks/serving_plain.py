"""What a user of KServe and transformers would write: a model whose predict generates the answer to each question.

The peer of `benchmarks/serving.py`: the same body as ours, `{"instances": [{"image": {"b64"}, "question"}, ...]}`, one
`generate` a question, nothing batched.

    .venv/bin/python benchmarks/serving_plain.py --model FOLDER --port 18090 --threads 1
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    chosen = parser.parse_args()
    sys.argv = sys.argv[:1]  # KServe reads the command line when it is imported

    import kserve
    import kserve.model_server
    import torch
    from kserve.protocol.rest.server import RESTServer
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import facemllm.model  # noqa: F401 - registers the tiny preset's tower

    torch.set_num_threads(chosen.threads)
    model: Any = AutoModelForImageTextToText.from_pretrained(chosen.model).eval()
    processor: Any = AutoProcessor.from_pretrained(chosen.model)

    class Plain(kserve.Model):
        def load(self) -> bool:
            self.ready = True
            return True

        def predict(self, payload: Any, headers: Any = None, response_headers: Any = None) -> dict[str, Any]:
            return {"predictions": [{"answer": answer(one)} for one in payload["instances"]]}

    @torch.inference_mode()
    def answer(instance: dict[str, Any]) -> str:
        image = Image.open(io.BytesIO(base64.b64decode(instance["image"]["b64"]))).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": instance["question"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=image, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=chosen.max_new_tokens, do_sample=False)
        return str(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    class Loopback(RESTServer):  # KServe has 0.0.0.0 in its code
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.config.host = "127.0.0.1"

    kserve.model_server.RESTServer = Loopback
    plain = Plain("face-mllm")
    plain.load()
    kserve.ModelServer(http_port=chosen.port, enable_grpc=False, enable_latency_logging=False).start([plain])


if __name__ == "__main__":
    main()
