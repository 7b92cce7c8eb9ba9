"""What the exported model of a run answers, read as a worker reads images; nearness is the last column.

python -m benchmarks.finetuning.ours_tool RUN FILES ANSWERS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from archive import serving
from archive.run_folder import RunFolder
from handler import variants
from measure import evaluation


def main(run: str, files: str, answers: str) -> None:
    folder = RunFolder(Path(run))
    predict = variants.load_torchscript(folder.model, variants.tells_nearness(folder.model))
    paths = [Path(file) for file in Path(files).read_text().splitlines()]
    answered, refused = evaluation.of_files(predict, serving.read(folder.path).handler, paths)
    if refused:
        raise SystemExit(f"{refused} of the images cannot be decoded")
    np.save(answers, answered.numpy())


if __name__ == "__main__":
    main(*sys.argv[1:])
