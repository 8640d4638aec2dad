"""The list of models that `facemllm leaderboard` compares: a YAML file.

    models:
      - {name: LLaVA, kind: ours, where: models/llava-1.5-7b}
      - {name: Face-MLLM, kind: ours, where: "3", fine_tuned_from: LLaVA}
      - {name: Qwen, kind: hub, where: /models/Qwen2.5-VL-3B-Instruct}
      - {name: GPT, kind: endpoint, where: https://host/v1, model: gpt-x, input_price: 2.5, output_price: 10}

`ours` is a model directory, trained here or not, or a registered version, shown pictures of the side that it notes, or
of `image_size`; `hub` a folder of any model that `model.base` may be, shown whole pictures and asked in words;
`endpoint` an OpenAI-compatible address.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from facemllm.errors import UserError
from facemllm.settings import Settings
from facemllm.settings.data import Section
from facemllm.settings.mappings import read_yaml

Name = Annotated[str, Field(min_length=1, max_length=80)]


class Listed(Section):
    """A model of the list. `model` is its name at an endpoint; prices are per million tokens."""

    name: Name
    kind: Literal["ours", "hub", "endpoint"]
    where: Annotated[str, Field(min_length=1, max_length=4096)]
    fine_tuned_from: str | None = None
    image_size: Annotated[int, Field(ge=1)] | None = None
    model: str | None = None
    key_variable: str | None = None
    third_party: bool | None = None
    input_price: Annotated[float, Field(ge=0)] | None = None
    output_price: Annotated[float, Field(ge=0)] | None = None


class _List(Section):
    models: Annotated[list[Listed], Field(min_length=1)]


def read_list(path: Path) -> list[Listed]:
    """The models of a list. Raises UserError naming file and key when it has another form, a name stands twice, or
    `fine_tuned_from` names none of them."""
    try:
        models = _List.model_validate(read_yaml(path)).models
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc'])) or 'models'}: {first['msg']}") from None
    names = [one.name for one in models]
    for one in models:
        if names.count(one.name) > 1:
            raise UserError(f"{path}: two models are called {one.name}")
        if one.fine_tuned_from is not None and one.fine_tuned_from not in set(names) - {one.name}:
            raise UserError(
                f"{path}: {one.name} is fine_tuned_from {one.fine_tuned_from}, which is no other of the list"
            )
        if (one.model is None) == (one.kind == "endpoint"):
            raise UserError(
                f"{path}: {one.name}: model is a name at an endpoint; an endpoint needs it, others have none"
            )
        if one.image_size is not None and one.kind != "ours":
            raise UserError(
                f"{path}: {one.name}: image_size is for models of kind ours; others are shown pictures of at most "
                "annotate.vision_language.image_side pixels"
            )
    return models


def settings_of(settings: Settings, listed: Listed) -> Settings:
    """Settings with the endpoint of a model, where it has one."""
    if listed.kind != "endpoint":
        return settings
    given = {"base_url": listed.where, **{n: getattr(listed, n) for n in ("key_variable", "third_party")}}
    given |= {"input_price": listed.input_price, "output_price": listed.output_price}
    endpoint = settings.annotate.endpoint.model_copy(update={k: v for k, v in given.items() if v is not None})
    named = settings.annotate.vision_language.model_copy(update={"model": listed.model})
    changed = {"endpoint": endpoint, "vision_language": named}
    return settings.model_copy(update={"annotate": settings.annotate.model_copy(update=changed)})
