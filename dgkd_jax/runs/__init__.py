"""What every run needs: its config, its work directory, its checkpoints, its processes."""
