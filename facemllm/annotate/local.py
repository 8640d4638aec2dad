"""The annotator that is a vision-language model on this machine: `annotator: local`. Nothing leaves the machine, so the
ledger has no say. Each Ray task takes a GPU where there is one."""

from __future__ import annotations

from facemllm.annotate.describer import Describer
from facemllm.asking.carried import parameters
from facemllm.asking.local import Generated, digest_of, folder_of, has_gpu
from facemllm.settings import Settings


def local(settings: Settings) -> Describer:
    """The configured model. Raises UserError when it is not there or is none that may be loaded."""
    looks = settings.annotate.vision_language
    folder = folder_of(str(looks.model))
    digest = digest_of(folder)
    return Describer(
        name="local",
        model=digest,
        model_digest=digest,
        parameters=parameters(settings),
        sender=Generated(folder, settings.home, digest, looks.max_tokens, looks.temperature),
        home=settings.home,
        gpus=1.0 if has_gpu() else 0.0,
    )
