"""The command `ready`: whether a model has its workers and answers as training measured, once or over HTTP."""
