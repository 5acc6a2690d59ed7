"""Helpers without knowledge of the methods: configuration, checkpoints, processes, metrics, plots."""
