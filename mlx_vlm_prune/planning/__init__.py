"""Planning: operations, time and memory of an answer, predicted before it is generated.

`operations.py` counts multiply-adds from the configuration alone. `calibration.py` runs and times
the model on this machine. `prediction.py` predicts time and memory for any K from these runs.
`budgets.py` chooses K for a budget in milliseconds or GB.
"""
