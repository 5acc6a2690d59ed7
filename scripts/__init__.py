"""Scripts around the training: run them from the repository's root as `python -m scripts.NAME`."""
