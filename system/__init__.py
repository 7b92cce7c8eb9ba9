"""What every room may stand on: files, locks, signals, cores, one-line errors, a progress bar; a module for each."""
