"""Mend an environment in which PyPI's torchvision, built for CUDA, stands beside torch's CPU build.

Run by that environment's python; `make test-vllm` does. torchvision then stops at import for want of two operators of
its CUDA library, which no model here calls: they are declared.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

SHIM = (
    "import torch\n"
    '_declared = torch.library.Library("torchvision", "DEF")\n'
    'for _name in ("nms", "qnms"):\n'
    '    _declared.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
)


def main() -> None:
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None, "torchvision is not installed"
    assert spec.origin is not None
    works = [sys.executable, "-c", "import torchvision"]
    if subprocess.run(works, capture_output=True, check=False).returncode:
        file = Path(spec.origin)
        file.write_text(SHIM + file.read_text("utf-8"), "utf-8")
        subprocess.run(works, check=True)


if __name__ == "__main__":
    main()
