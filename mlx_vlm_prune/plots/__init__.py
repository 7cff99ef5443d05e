"""Figures of what was measured, each as PNG and SVG; matplotlib is imported when one is drawn.

`style.py` has colours, markers and how a figure is saved, `panels.py` what is drawn into one.
`measured.py` reads results of `sweep` and `evaluate`, `figures.py` chooses their figures, and
`page.py` is the page of all.
"""
