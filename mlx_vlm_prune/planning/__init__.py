"""What an answer will take: operation counts, calibration, budgets in ms and GB."""
