"""The command `rollout`: a new version beside the old one."""
