"""Run folder → `.mar`: stage the files, build with torch-model-archiver, move into the model store."""
