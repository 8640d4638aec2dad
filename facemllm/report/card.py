"""The model card: what a version is, what it was made from, how well it does, and what it must not be used for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from facemllm.core import cost
from facemllm.report import card_figures as measured
from facemllm.settings import Settings
from facemllm.version import ledger

SHORT = 1000  # characters; MLflow shows the description in full beside a version


def card(
    settings: Settings,
    model_digest: str,
    evaluation: Mapping[str, Any],
    lineage: Mapping[str, str],
    sources: Sequence[str],
    costs: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """The model card in Markdown, with the metadata header that model hubs read.

    `evaluation` is `metrics.json`; `lineage` names digests of what the model was made from, `sources` whose pictures,
    `costs` what each step cost. What was not measured is left out.
    """
    made = "\n".join(f"| {name} | `{digest}` |" for name, digest in lineage.items())
    sections = {
        "What it is": _what(settings),
        "Data": _data(settings, sources) + _maps(sources, evaluation),
        "Results": f"{_split(settings)}\n\n{measured.results(evaluation)}",
        "Zero-shot": measured.zero_shot(evaluation),
        "Groups of people": _fairness(evaluation),
        "What can be relied on": measured.reliance(evaluation),
        "Intended use": _use(),
        "Limits": _limits(sources, evaluation),
        "Cost": _cost(settings, costs or {}),
        "Made from": f"| | SHA-256 |\n|---|---|\n| model | `{model_digest}` |\n{made}".rstrip(),
    }
    tags = ["face-perception", "multimodal", *(["synthetic-data"] if _synthetic(sources) else [])]
    header = "\n".join(["---", "pipeline_tag: image-text-to-text", f"tags: [{', '.join(tags)}]", "---"])
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items() if text)
    return f"{header}\n\n# {settings.promote.model_name}\n\n{body}\n"


def short(settings: Settings, model_digest: str, evaluation: Mapping[str, Any], sources: Sequence[str]) -> str:
    """The card in a few lines, for the description of a registered version."""
    data = "synthetic heads; says nothing about real photographs" if _synthetic(sources) else ", ".join(sources)
    headline = ", ".join(
        f"{task} {measured.estimate(part)} {part.get('metric') or ''} {part.get('unit') or ''}".rstrip()
        for task, part in evaluation.get("tasks", {}).items()
    )
    lines = [
        f"Data: {data}. Profile {settings.profile}. Model {model_digest[:12]}.",
        f"Held-out people ({settings.evaluate.split}): {headline}.",
        "Not for identifying people, nor for decisions about them.",
    ]
    return "\n".join(lines)[:SHORT]


def _synthetic(sources: Sequence[str]) -> bool:
    return list(sources) == ["render"]


def _what(settings: Settings) -> str:
    stages = " → ".join(settings.stages())
    return (
        "A multimodal language model that answers questions about one face in an image "
        f"({', '.join(settings.reformat.tasks)}). LLaVA layout, from {settings.model.origin}; trained in the stages "
        f"{stages} (profile `{settings.profile}`, seed {settings.seed})."
    )


def _data(settings: Settings, sources: Sequence[str]) -> str:
    if _synthetic(sources):
        about = (
            "Drawn parametric heads (MakeHuman morphs, CC0); no person is depicted, and the labels are exact because "
            "the renderer made them. **What the model learns from them says nothing about real photographs.**"
        )
    else:
        about = (
            "Pictures and labels of the sources below, under their licences. Labels are the sources' annotations, with "
            "their errors; splits never share a subject that a source names."
        )
    rows = ledger.entries(settings)
    lines = ["| source | licence | status | allowed |", "|---|---|---|---|"]
    for key in sources:
        row = rows[key]
        lines.append(f"| {row.name} | {row.licence} | {row.status} | {', '.join(row.uses)} |")
    uses = ledger.allowed(settings, sources)
    may = "; ".join(ledger.MEANING[use] for use in uses) or "nothing"
    return f"{about}\n\n" + "\n".join(lines) + f"\n\nWhat all of these allow: {may}."


def _maps(sources: Sequence[str], evaluation: Mapping[str, Any]) -> str:
    """Where the maps of face parts came from that the model was evaluated with."""
    found = evaluation.get("maps")
    if not found:
        return ""
    origin = (
        "exact, since the renderer drew them with the faces: a map of a real face, made by a person or a model, is not"
        if _synthetic(sources)
        else "those of the sources, or of the model that the faces table names in `provenance`"
    )
    return (
        f"\n\nThe model also looks at a map of face parts; evaluation showed it one beside {found['given']} of "
        f"{found['faces']} faces: {origin}."
    )


def _split(settings: Settings) -> str:
    return f"Split `{settings.evaluate.split}`: people absent from training. Intervals: bootstrap over people."


def _fairness(evaluation: Mapping[str, Any]) -> str:
    found = measured.fairness(evaluation)
    about = (
        "Groups as the sources label them. p is corrected for all pairs of groups of all tasks together (Holm); that "
        "no gap is shown does not mean that there is none."
    )
    return f"{about}\n\n{found}" if found else ""


def _cost(settings: Settings, found: Mapping[str, Mapping[str, Any]]) -> str:
    priced = {step: cost.priced(body, settings.cost.price_per_hour) for step, body in found.items()}
    return measured.cost(priced)


def _use() -> str:
    return (
        "Research and engineering on face perception: descriptions and visible attributes of a face, to be checked by "
        "a person. **Not for identifying or tracking anyone**, nor for decisions about people (hiring, credit, "
        "policing, access, medicine). Expression is what a face shows, not what a person feels; gender and ethnicity "
        "are labels given by annotators, not facts about a person."
    )


def _limits(sources: Sequence[str], evaluation: Mapping[str, Any]) -> str:
    real = (
        "Nothing here was measured on photographs: figures describe drawn heads alone."
        if _synthetic(sources)
        else "Figures hold for this source's people and cameras; other groups and conditions may do worse."
    )
    lines = [
        real,
        "One face an image; small, turned, covered or badly lit faces do worse.",
        "Answers can be wrong and sound sure; compare every figure with its baselines.",
        *measured.weaknesses(evaluation),
    ]
    return "\n".join(f"- {line}" for line in lines)
