"""What losses, networks and runs look like: measures over a whole split, figures, pages. No loss depends on it."""
