"""Run folder → `.mar`: stage, build with torch-model-archiver, prove, move into the model store; and check archives."""
