"""MME (arXiv:2306.13394): two questions about every image, one to affirm and one to deny.

Read is the published folder: one folder a subtask, with a text file an image, of two lines
"question TAB Yes or No"; the image has the file's name and lies beside it, or the two lie in
`images` and `questions_answers_YN`. The questions end with "Please answer yes or no." as they
are; nothing is added. The kind is the subtask.

The authors' rule: an answer is yes if its first four characters hold "yes", in any case, else no
if they hold "no", else neither. A subtask's score is its accuracy in % plus its accuracy+ in %,
the share of images of which both questions are right: 200 at most. The total is the sum over
the subtasks, ten of perception and four of cognition, which `more` gives apart.
"""

from collections.abc import Iterator
from pathlib import Path

from ...checkpoints.errors import UserError
from . import Bad, Question, Source, mean
from .reading import Fault, each, folder

UNIT, TOTAL = "", "sum"
PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()
SUFFIXES = (".jpg", ".jpeg", ".png")
LONGEST = 1 << 16  # bytes of two questions


def read(source: Source, bad: Bad) -> Iterator[Question]:
    """The questions of a folder. Raises UserError where there is no subtask in it."""
    tasks = [task for task in sorted(folder(source.path).iterdir()) if _is_task(task)]
    if not tasks:
        raise UserError(f"{source.path} holds no folder with images and their questions")
    files = ((str(file), (task, file)) for task in tasks for file in _files(task))
    return each(files, lambda told: _questions(*told), bad)


def _pictures(task: Path) -> Path:
    return task / "images" if (task / "images").is_dir() else task


def _is_task(task: Path) -> bool:
    if not task.is_dir():
        return False
    return any(file.suffix.lower() in SUFFIXES for file in _pictures(task).iterdir())


def _files(task: Path) -> list[Path]:
    apart = task / "questions_answers_YN"
    return sorted((apart if apart.is_dir() else task).glob("*.txt"))


def _questions(task: Path, file: Path) -> list[Question]:
    near = (_pictures(task) / (file.stem + suffix) for suffix in SUFFIXES)
    image = next((path for path in near if path.is_file()), None)
    if image is None:
        raise Fault(f"there is no image {file.stem} ({', '.join(SUFFIXES)})")
    group, made = f"{task.name}/{file.stem}", []
    for number, line in enumerate(_lines(file), 1):
        text, _, label = line.rpartition("\t")
        label = label.strip().lower()
        if not text.strip() or label not in ("yes", "no"):
            raise Fault(f"line {number} is not a question, a tab, and Yes or No")
        name = f"{group}-{number}"
        made.append(Question(name, text.strip(), (label,), image, task.name, group))
    if len(made) != 2:
        raise Fault(f"there are {len(made)} questions; there must be two")
    return made


def _lines(file: Path) -> list[str]:
    try:
        if file.stat().st_size > LONGEST:
            raise Fault("this is too long for two questions")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        raise Fault("this cannot be read as text") from None
    return [line for line in text.splitlines() if line.strip()]


def meant(said: str) -> str:
    """ "yes", "no" or "other", by the authors' rule."""
    start = said.strip().lower()[:4]
    return next((word for word in ("yes", "no") if word in start), "other")


def score(question: Question, said: str) -> float:
    """1 where the answer means the label, else 0."""
    return float(meant(said) == question.answers[0])


def together(scores: list[float]) -> float:
    """An image's accuracy plus, where both answers are right, 1: what accuracy+ adds."""
    return mean(scores) + float(min(scores) == 1)


def more(questions: list[Question], said: list[str]) -> dict[str, float]:
    """The sums of perception and of cognition, as far as their subtasks were asked."""
    groups: dict[tuple[str, str], list[float]] = {}
    for question, answer in zip(questions, said, strict=True):
        key = (question.kind, question.group)
        groups.setdefault(key, []).append(score(question, answer))
    images: dict[str, list[float]] = {}
    for (kind, _), scores in groups.items():
        images.setdefault(kind, []).append(100 * together(scores))
    halves = {"perception": PERCEPTION, "cognition": COGNITION}
    asked = {half: [kind for kind in images if kind in halves[half]] for half in halves}
    return {half: sum(mean(images[k]) for k in kinds) for half, kinds in asked.items() if kinds}
