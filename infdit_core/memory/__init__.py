"""How much memory a run takes, and what to do when it is not enough."""
