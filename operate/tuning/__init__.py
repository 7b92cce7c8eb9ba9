"""The commands `load` and `tune`: a bounded load, and the layout of workers and batches that it favours."""
