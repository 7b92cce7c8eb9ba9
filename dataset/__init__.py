"""A folder or the name of a data set → labelled images to train on, to validate and to measure."""
