"""The annotator that is an OpenAI-compatible endpoint: `annotator: endpoint`.

Who may be shown to it is the ledger's decision when the endpoint is a third party's: rows of a source that does not
allow it are refused with the ledger's reason and never leave the machine.
"""

from __future__ import annotations

from collections.abc import Iterable

from facemllm.annotate import prompt, replies
from facemllm.annotate.describer import Describer
from facemllm.asking.carried import carried, forbidden, parameters
from facemllm.core import digests
from facemllm.settings import Settings


def endpoint(settings: Settings, sources: Iterable[str], backoff_s: float = 1.0) -> Describer:
    """The configured endpoint, for a table of these sources.

    Raises UserError when its address or key cannot be used, or when no source may be sent to it.
    """
    told, model = settings.annotate.endpoint, str(settings.annotate.vision_language.model)
    shape = parameters(settings)
    return Describer(
        name="endpoint",
        model=model,
        model_digest=digests.of_json(["endpoint", model, shape]),
        parameters=shape,
        sender=carried(settings, account(model, shape), replies.schema(), backoff_s),
        home=settings.home,
        forbidden=forbidden(settings, sources) if told.third_party else {},
        input_price=told.input_price,
        output_price=told.output_price,
    )


def account(model: str, parameters: object) -> str:
    """Name of the account of a job: what is asked, of which model, how."""
    return digests.of_json([model, prompt.template_digest(), parameters])[:16]
