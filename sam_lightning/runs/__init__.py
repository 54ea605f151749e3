"""A run's directory, its files and its checkpoints: what is written is whole or not there.

Also the threads that a process may use. Knows nothing of training; reading a run's directory needs no Lightning.
"""
