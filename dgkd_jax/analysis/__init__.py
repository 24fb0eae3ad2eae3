"""What the losses and the runs look like: figures and measures that no training step needs."""
