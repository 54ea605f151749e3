"""A run's directory, its files and its checkpoints: what is written is whole or not there.

Knows nothing of training; reading a run's directory needs no Lightning.
"""
