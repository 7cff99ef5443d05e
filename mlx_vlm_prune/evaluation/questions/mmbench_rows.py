"""MMBench's TSV as LLaVA asks it (`--format mmbench-rows`): every row once, as it stands.

The published files hold the rotations of a question's options as rows of their own, with 1,000,000
more in their index each time. Prompts are LLaVA's (arXiv:2304.08485): the hint, the question, the
options with letters and the suffix, which is Chinese where the file's name holds "_cn_". `upload`
is the spreadsheet that the authors' server takes.

Where the file has the right answers a question counts if all its rows are right, by the rule in
mmbench.py. A file without a column `answer` (split test) is not scored.
"""

from collections.abc import Iterator

from . import BadRecords, Question, Source
from .mmbench import (
    FIRST_ROTATED_INDEX,
    choices_of,
    columns_of,
    group_score,
    image_of,
    score,
    table_rows,
    value_of,
)
from .records import RecordError, existing_file, questions_from, text_field
from .shared_rules import LETTERS, ONE_LETTER, lettered_options
from .xlsx import spreadsheet

__all__ = ["group_score", "read", "score", "upload"]

ONE_LETTER_CN = "请直接回答选项字母。"
COLUMNS = ("index", "question", "A", "B", "image")
NOT_UPLOADED = {"hint", "category", "source", "image", "comment", "l2-category"}
PREDICTION = 6  # the number of the column that the server reads


def read(source: Source, bad: BadRecords) -> Iterator[Question]:
    """The questions of a TSV file, one for each row. Raises UserError where it cannot be read."""
    path = existing_file(source.path)
    columns_of(path, COLUMNS)
    suffix = ONE_LETTER_CN if "_cn_" in path.name.lower() else ONE_LETTER
    images: dict[str, bytes] = {}
    return questions_from(table_rows(path), lambda row: [_question(row, images, suffix)], bad)


def _question(row: dict[str, str], images: dict[str, bytes], suffix: str) -> Question:
    index, choices = text_field(row, "index"), choices_of(row)
    if len(choices) < 2:
        raise RecordError("there are fewer than two options")
    letters, right = LETTERS[: len(choices)], value_of(row, "answer")
    if len(right) > 1 or right not in letters:
        raise RecordError(f"answer is {right[:40]!r}; it is one of {', '.join(letters)}")
    hint = value_of(row, "hint")
    text_of_row = (f"{hint}\n" if hint else "") + text_field(row, "question")
    prompt = f"{text_of_row}\n{lettered_options(choices)}"
    number = int(index[:12]) if index.isdecimal() else index
    record = {"question_id": number, "round_id": 0, "prompt": prompt, "options": choices,
              "option_char": [*letters]}  # fmt: skip
    return Question(
        id=index,
        text=f"{prompt}\n{suffix}",
        answers=(right,) if right else (),
        image=image_of(row, images),
        kind=value_of(row, "l2-category") or value_of(row, "category") or "all",
        group=str(number % FIRST_ROTATED_INDEX) if isinstance(number, int) else index,
        scoring_data=tuple(choices),
        record=record,
    )


def upload(questions: list[Question], responses: list[str], source: Source) -> dict[str, bytes]:
    """The spreadsheet with a column `prediction`; rows that were not asked have none."""
    answers = {q.id: response for q, response in zip(questions, responses, strict=True)}
    columns = [name for name in columns_of(source.path, COLUMNS) if name not in NOT_UPLOADED]
    columns.insert(PREDICTION, "prediction")
    at, index_at = columns.index("prediction"), columns.index("index")
    rows: list[list[str | int]] = []
    for _, row in table_rows(source.path):
        index = row.get("index") or ""
        cells: list[str | int] = [row.get(name) or "" for name in columns]
        cells[at] = answers.get(index, "")
        cells[index_at] = int(index[:12]) if index.isdecimal() else index
        rows.append(cells)
    return {".xlsx": spreadsheet(columns, rows)}
