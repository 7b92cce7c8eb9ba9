"""Measurements that anyone can repeat: each a command, each a ratio against a baseline of the same run."""
