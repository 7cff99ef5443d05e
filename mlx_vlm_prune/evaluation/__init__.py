"""Evaluation: what methods cost in answers, on any question set.

`mlx_vlm_prune.evaluate` is the command that puts these parts together: a question set
(`questions/`, `question_set.py`) is put to methods at budgets (`budgeted_methods.py`) by a run that
can be resumed (`evaluation_run.py`, `resume.py`). `answers.py` asks our models, `drafting.py` those
with a twig that drafts, `host_answers.py` those of mlx-vlm. `judge.py` scores (`language_judge.py`
where a language model grades), `bootstrap.py` gives intervals, `first_token.py` measures times.
`result.py` puts all into one JSON, `table.py` prints it, `merging.py` averages several, and
`answer_files.py` writes the answers for the benchmarks' own evaluation.
"""
