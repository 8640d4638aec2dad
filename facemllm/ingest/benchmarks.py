"""Benchmarks of multiple-choice questions about faces, as conversations for evaluation: split `test`, never trained on.

One row a question; a question about several pictures has them all, in the order in which it numbers them.

FaceXBench (form verified in its repository)
    benchmark/*.json      category, sub-category, questions: {id: image_paths, question_text, options,
                          correct_answer_option (a letter), answer (its text)}; context for tools_use
    benchmark/images/     what image_paths names, relative to benchmark/
Face-Human-Bench (form verified in its repository; of the pictures, which its users make themselves, only the names)
    test/json/en/*.json   data: [type, QA: question, options, answer (an index), image: image_paths by variant]
    eval_data/            beside json/, under test/output/, output/, data/ or at the root: made by its prepare_data.py
Of the latter the English test half is read; each variant (cropped, original, boxed) is a question of its own, as in its
own evaluation.

Letters do not survive: the options are listed as words under the question and the canonical answer is the option's
text, since options are scored by likelihood. FaceXBench keeps its order and its zero-shot form (no task description).
Face-Human-Bench often puts the right one first and has its evaluation rotate the options at random; here a hash does.
Pictures are reduced to 1000 pixels a side, as Face-Human-Bench's evaluation does.

`task` is the benchmark, its category and, in FaceXBench, the sub-category: `facexbench_face_localization_headpose`,
`face_human_bench_face_age_basic_10_cropped`; `template` is file and question: `biwi_single_mcq/17`.
Refused: questions that name or match people (this project does not; by their task, and by `refuses`, which reads their
words), that were asked before, whose picture is missing or unreadable, whose options are fewer than two or repeat,
whose answer is no option or contradicts its letter, that are longer than any real one; files that are none of the
benchmark's, leave its folder or are too large.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from facemllm.core import digests, images
from facemllm.core.digests import draw
from facemllm.errors import UserError, one_line
from facemllm.ingest import labels
from facemllm.ingest.reader import Refuse, Refused, contents, files, snake
from facemllm.tasks.multiple_choice import BENCHMARKS, listed

KEYS = tuple(BENCHMARKS)

MAX_SIDE = 1000
MAX_JSON = 64 * 2**20
MAX_TEXT, MAX_OPTION, MAX_PICTURES = 32_000, 2_000, 32
"""Characters of a question with its context, of an option; pictures of a question."""
_IDENTIFYING = ("facexbench_face_recognition", "face_human_bench_face_recognition", "face_human_bench_human_reid")
_LETTERS = "ABCDEFGHIJ"
_UNREAD = ""  # a name that no benchmark has
_TEST = ("data/Face-Human-Bench/test", "Face-Human-Bench/test", "test", ".")


@dataclass(frozen=True, kw_only=True)
class _Question:
    """One question as its file gives it; `own` is its text without what stands before every question of the file."""

    task: str
    template: str
    text: str
    own: str
    options: tuple[str, ...]
    answer: str
    pictures: tuple[str, ...]


_Asked = tuple[Path, Path, int, Iterator[_Question]]
"""Folder of the pictures, file, place in it from 1, and the questions that stand there; taking one may raise Refuse."""

Refuses = Callable[[str], str | None]
"""Why the words of a question may not be asked; None where they may."""


class _Object(dict[str, Any]):
    """A JSON object; `repeated` are the names that stand in it more than once."""

    repeated: frozenset[str] = frozenset()


def read(source: str, root: Path, refuses: Refuses = lambda text: None) -> Iterator[dict[str, Any] | Refused]:
    """Rows of `conversations` from a benchmark on disk, file by file. `row` of a refused one is the question's place in
    its file, 0 if the file itself is refused. Raises UserError when `source` is none of `KEYS`, or a folder is missing,
    or holds no JSON file."""
    if source not in KEYS:
        raise UserError(f"no benchmark '{source}'; there are {', '.join(KEYS)}")
    known = labels.Names()
    for home, path, number, questions in _facexbench(root) if source == KEYS[0] else _face_human_bench(root):
        file = path.relative_to(root).as_posix().encode("utf-8", "replace").decode()
        try:
            for question in questions:
                try:
                    _check(question, refuses)
                    row = _row(source, question, [_picture(home, name) for name in question.pictures])
                    shown = [digests.of_bytes(picture["bytes"]) for picture in row["images"]]
                    asked = [shown, question.task, question.text, sorted(question.options), question.answer]
                    if not known.add(digests.of_json(asked)):
                        raise Refuse("the same question about the same pictures stands there before")
                    yield row
                except (Refuse, images.BadPicture) as error:
                    yield Refused(file, number, one_line(error))
        except Refuse as error:
            yield Refused(file, number, one_line(error))


def _check(question: _Question, refuses: Refuses) -> None:
    """Raises Refuse for a question that may not be asked, is too long, or holds what is no text."""
    if question.task.startswith(_IDENTIFYING):
        raise Refuse("it asks to name or match people, which this project does not do")
    for size, most, what in (
        (len(question.text), MAX_TEXT, "characters of the question"),
        (max(map(len, question.options)), MAX_OPTION, "characters of an option"),
        (len(question.pictures), MAX_PICTURES, "pictures"),
    ):
        if size > most:
            raise Refuse(f"{size:,} {what}, more than {most:,}")
    try:
        "".join((question.task, question.template, question.text, *question.options, *question.pictures)).encode()
    except UnicodeEncodeError:
        raise Refuse("half a surrogate pair (\\ud800 and the like) is no text; mend its id, words or picture") from None
    if why := refuses(question.own):
        raise Refuse(f"its words ask to name or match people: {why}")


def _facexbench(root: Path) -> Iterator[_Asked]:
    home = labels.existing(root, "benchmark", ".")
    for path, held in _json(home, root):
        category, minor, asked = held.get("category"), held.get("sub-category"), held.get("questions")
        if not isinstance(category, str) or not isinstance(minor, str) or not isinstance(asked, _Object):
            why = held.get(_UNREAD, "no FaceXBench file: category, sub-category and questions are expected")
            yield home, path, 0, _refused(why)
            continue
        task = f"facexbench_{snake(category)}_{snake(minor)}"
        context = held["context"] if isinstance(held.get("context"), str) else ""
        for number, (name, item) in enumerate(asked.items(), start=1):
            if name in asked.repeated:
                yield home, path, number, _refused(f"the id {name!r} stands in the file more than once")
            else:
                yield home, path, number, _choice(item, task, f"{path.stem}/{name}", context)


def _choice(item: Any, task: str, template: str, context: str) -> Iterator[_Question]:
    options = _options(_field(item, "options", list))
    letter = _field(item, "correct_answer_option", str).strip().upper()
    if len(letter) != 1 or letter not in _LETTERS[: len(options)]:
        raise Refuse(f"the answer is option {letter!r}, and there are {len(options)}")
    answer = options[_LETTERS.index(letter)]
    if "answer" in item and str(item["answer"]).strip() != answer:
        raise Refuse(f"the answer is option {letter}, {answer!r}, and also {str(item['answer'])!r}")
    yield _Question(
        task=task,
        template=template,
        text="\n".join(filter(None, (context, _field(item, "question_text", str)))),
        own=item["question_text"],
        options=options,
        answer=answer,
        pictures=_names(_field(item, "image_paths", list)),
    )


def _face_human_bench(root: Path) -> Iterator[_Asked]:
    test = next((root / name for name in _TEST if (root / name / "json/en").is_dir()), None)
    if test is None:
        raise UserError(f"{root}: no folder test/json/en; give the folder that holds Face-Human-Bench's test half")
    places = (test, test / "output", root, root / "output", root / "data")
    home = next((place for place in places if (place / "eval_data").is_dir()), None)
    if home is None:
        raise UserError(f"{test}: no folder eval_data; make it from your copies of its sources with prepare_data.py")
    for path, held in _json(test / "json/en", root):
        asked = held.get("data")
        if not isinstance(asked, list):
            why = held.get(_UNREAD, "no Face-Human-Bench file: a list under data is expected")
            yield home, path, 0, _refused(why)
            continue
        yield from ((home, path, number, _variants(number, item)) for number, item in enumerate(asked, start=1))


def _variants(number: int, item: Any) -> Iterator[_Question]:
    """One question a variant of the picture."""
    kind, asked = _field(item, "type", str), _field(item, "QA", dict)
    options = _options(_field(asked, "options", list))
    index = _field(asked, "answer", int)
    if not 0 <= index < len(options):
        raise Refuse(f"the answer is option {index} (from 0), and there are {len(options)}")
    paths = _field(_field(item, "image", dict), "image_paths", dict)
    if not paths:
        raise Refuse("it names no picture")
    turned = draw(len(options), "face-human-bench", kind, str(number))
    for variant, name in sorted(paths.items()):
        yield _Question(
            task=f"face_human_bench_{snake(kind)}_{snake(variant)}",
            template=f"{kind}_{variant}/{number}",
            text=_field(asked, "question", str),
            own=asked["question"],
            options=options[turned:] + options[:turned],
            answer=options[index],
            pictures=_names([name]),
        )


def _row(source: str, question: _Question, pictures: Sequence[bytes]) -> dict[str, Any]:
    ids = [digests.of_bytes(picture) for picture in pictures]
    text = listed(question.text, question.options)
    shown = [{"type": "image", "text": None}] * len(pictures)
    made = {
        "image_id": ids[0],
        "split": "test",
        "source": source,
        "subject_id": None,
        "groups": [],
        "messages": [
            {"role": "user", "content": [*shown, {"type": "text", "text": text}]},
            {"role": "assistant", "content": [{"type": "text", "text": question.answer}]},
        ],
        "turns": [
            {
                "sample_id": digests.of_json([ids, question.task, question.template]),
                "task": question.task,
                "form": "choice",
                "template": question.template,
                "options": list(question.options),
                "answer": question.answer,
                "follows": False,
            }
        ],
    }
    return made | {
        "conversation_id": digests.of_json({**made, "images": ids}),
        "images": [{"bytes": picture, "path": None} for picture in pictures],
        "segmentation": None,
    }


def _picture(home: Path, name: str) -> bytes:
    """A picture under the benchmark's folder, reduced and encoded anew. Raises Refuse or BadPicture."""
    data = contents(labels.inside(home, name), home, images.MAX_BYTES, f"the picture {name}")
    picture = images.opened(data)
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return images.encoded(picture)


def _json(folder: Path, root: Path) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Every JSON file of a folder; of one that is not read, `_UNREAD` says why. Raises UserError when there is none."""
    paths = [folder / name for name in files(folder) if name.lower().endswith(".json")]
    if not paths:
        raise UserError(f"{folder}: no .json files")
    for path in paths:
        try:
            held = json.loads(contents(path, root, MAX_JSON, "it").decode("utf-8-sig"), object_pairs_hook=_object)
        except Refuse as error:
            held = {_UNREAD: str(error)}
        except (ValueError, RecursionError) as error:
            held = {_UNREAD: f"no sound JSON in UTF-8 ({one_line(error)})"}
        yield path, held if isinstance(held, dict) else {}


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    if len(found) < len(pairs):
        found.repeated = frozenset(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return found


def _refused(why: str) -> Iterator[_Question]:
    raise Refuse(why)
    yield


def _field(item: Any, name: str, kind: type) -> Any:
    value = item.get(name) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or (kind is str and not str(value).strip()):
        raise Refuse(f"{name} is missing or no {'text' if kind is str else kind.__name__}")
    return value


def _options(values: Sequence[Any]) -> tuple[str, ...]:
    if not all(isinstance(value, str | int | float) for value in values):
        raise Refuse("an option is no text")
    options = tuple(str(value).strip() for value in values)
    if not 2 <= len(options) <= len(_LETTERS) or len(set(options)) < len(options) or not all(options):
        raise Refuse(f"the options are fewer than two, more than {len(_LETTERS)}, empty or repeated: {list(options)}")
    return options


def _names(values: Sequence[Any]) -> tuple[str, ...]:
    if not values or not all(isinstance(value, str) for value in values):
        raise Refuse("it names no picture")
    return tuple(values)
