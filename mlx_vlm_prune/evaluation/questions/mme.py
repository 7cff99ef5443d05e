"""MME (arXiv:2306.13394): two questions about every image, one to affirm and one to deny.

Reads the published folder: a folder for each subtask, with a text file for each image, of two
lines "question TAB Yes or No". The image has the file's name and lies beside it, or the two lie in
`images` and `questions_answers_YN`. The questions already end with "Please answer yes or no.", so
nothing is added. The kind is the subtask. Also LLaVA's prepared llava_mme.jsonl, with that folder
beside as MME_Benchmark_release_version; `upload` is what the authors' calculation.py reads.

The authors' rule: a response is yes if its first four characters hold "yes", in any case, else no
if they hold "no", else neither. A subtask's score is its accuracy in % plus its accuracy+ in %,
the share of images of which both questions are right: 200 at most. The total is the sum over the
subtasks, ten of perception and four of cognition, whose sums `extra_figures` reports.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ...checkpoints.errors import UserError
from ...checkpoints.reading.paths import find_files
from . import BadRecords, Question, Source, mean
from .prepared import is_prepared, prepared_images, read_prepared, without_suffix
from .records import RecordError, existing_folder, questions_from

UNIT, TOTAL = "", "sum"
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
IMAGES = "MME_Benchmark_release_version"  # beside LLaVA's file
YES_OR_NO = "Please answer yes or no."
SUFFIXES = (".jpg", ".jpeg", ".png")
LARGEST_FILE = 1 << 16  # bytes of two questions


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a folder. Raises UserError where there is no subtask in it."""
    if is_prepared(source.path):
        return _prepared(source, bad)
    return _published(source, bad)


def _published(source: Source, bad: BadRecords) -> Iterator[Question]:
    tasks = [task for task in sorted(existing_folder(source.path).iterdir()) if _is_task(task)]
    if not tasks:
        raise UserError(f"{source.path} holds no folder with images and their questions")
    files = ((str(file), (task, file)) for task in tasks for file in _files(task))
    return questions_from(files, lambda record: _questions(*record), bad)


def _image_folder(task: Path) -> Path:
    return task / "images" if (task / "images").is_dir() else task


def _is_task(task: Path) -> bool:
    if not task.is_dir():
        return False
    return any(file.suffix.lower() in SUFFIXES for file in _image_folder(task).iterdir())


def _files(task: Path) -> list[Path]:
    inside = task / "questions_answers_YN"
    return find_files(inside if inside.is_dir() else task, "*.txt")


def _questions(task: Path, file: Path) -> list[Question]:
    candidates = (_image_folder(task) / (file.stem + suffix) for suffix in SUFFIXES)
    image = next((path for path in candidates if path.is_file()), None)
    if image is None:
        raise RecordError(f"there is no image {file.stem} ({', '.join(SUFFIXES)})")
    group, questions = f"{task.name}/{file.stem}", []
    for number, line in enumerate(_lines(file), 1):
        text, _, label = line.rpartition("\t")
        label = label.strip().lower()
        if not text.strip() or label not in ("yes", "no"):
            raise RecordError(f"line {number} is not a question, a tab, and Yes or No")
        question_id = f"{group}-{number}"
        questions.append(Question(question_id, text.strip(), (label,), image, task.name, group))
    if len(questions) != 2:
        raise RecordError(f"there are {len(questions)} questions; there must be two")
    return questions


def _lines(file: Path) -> list[str]:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise RecordError("this is too long for two questions")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise RecordError("this cannot be read as text") from None
    return [line for line in text.splitlines() if line.strip()]


def _prepared(source: Source, bad: BadRecords) -> Iterator[Question]:
    """LLaVA's questions, with the labels of the published folder if it lies beside."""
    folder = prepared_images(source, IMAGES)
    has_labels = bool(find_files(folder, "*/*.txt", "*/*/*.txt"))
    published = _published(Source(folder), BadRecords(skip=True)) if has_labels else ()
    labelled = {_key(question.group, question.text): question for question in published}

    def annotate(question: Question) -> Question:
        task, _, file = question.id.partition("/")
        group = f"{task}/{Path(file).stem}"
        if not labelled:
            return replace(question, kind=task, group=group)
        if (twin := labelled.get(_key(group, question.text))) is None:
            raise RecordError(f"{folder} does not have this question about {group}")
        return replace(twin, text=question.text, image=question.image, record=question.record)

    return read_prepared(source, bad, IMAGES, annotate)


def _key(group: str, text: str) -> tuple[str, str]:
    """An image and a question about it, however the two ask for a short answer."""
    return group, " ".join(without_suffix(text).removesuffix(YES_OR_NO).split())


def upload(questions: list[Question], responses: list[str], source: Source) -> dict[str, bytes]:
    """A file for each subtask: image, question, label and response, with tabs between."""
    lines: dict[str, list[str]] = {}
    for question, response in zip(questions, responses, strict=True):
        label = question.answers[0].capitalize() if question.answers else ""
        cells = (question.group.partition("/")[2], question.text, label, response)
        line = "\t".join(" ".join(cell.split()) for cell in cells)
        lines.setdefault(question.kind, []).append(f"{line}\n")
    return {f"/{kind}.txt": "".join(rows).encode() for kind, rows in lines.items()}


def yes_or_no(response: str) -> str:
    """ "yes", "no" or "other", by the authors' rule."""
    start = response.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(question: Question, response: str) -> float:
    """1 where the response means the label, else 0."""
    return float(yes_or_no(response) == question.answers[0])


def group_score(scores: list[float]) -> float:
    """An image's accuracy, plus 1 for accuracy+ where both responses are right."""
    return mean(scores) + float(min(scores) == 1)


def extra_figures(
    questions: list[Question], responses: list[str], scores: list[float]
) -> dict[str, float]:
    """The sums over perception and over cognition, of the subtasks that were asked."""
    groups: dict[tuple[str, str], list[float]] = {}
    for question, question_score in zip(questions, scores, strict=True):
        groups.setdefault((question.kind, question.group), []).append(question_score)
    images: dict[str, list[float]] = {}
    for (kind, _), both in groups.items():
        images.setdefault(kind, []).append(100 * group_score(both))
    halves = {"perception": PERCEPTION, "cognition": COGNITION}
    present = {half: [kind for kind in images if kind in halves[half]] for half in halves}
    return {half: sum(mean(images[k]) for k in kinds) for half, kinds in present.items() if kinds}
