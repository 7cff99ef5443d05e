"""Training on a user's own pictures: what learns, from what, and how a run goes on after a stop."""
