"""What stands around a server: an edge of several, roll-outs, tuning and loads, readiness."""
