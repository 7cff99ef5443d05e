"""The OpenAI-compatible server: requests, budgets, the queue, streams and metrics."""
