"""Training: the train step, the loop around it, and the whole run."""
