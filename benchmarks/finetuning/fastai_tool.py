"""fastai's `fine_tune` as its book has it; run by the Python of its own environment, without this project.

python fastai_tool.py train DATA WEIGHTS LEARNER SIDE EPOCHS BATCH_SIZE SEED
python fastai_tool.py answer LEARNER FILES ANSWERS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from fastai.vision.all import ImageDataLoaders, Resize, aug_transforms, load_learner, set_seed, vision_learner


def train(data: str, weights: str, learner: str, side: str, epochs: str, batch_size: str, seed: str) -> None:
    set_seed(int(seed), reproducible=True)
    loaders = ImageDataLoaders.from_folder(
        data, train="train", valid="val", bs=int(batch_size),
        item_tfms=Resize(round(int(side) * 460 / 224)), batch_tfms=aug_transforms(size=int(side)),
    )  # fmt: skip
    learn = vision_learner(loaders, "tf_efficientnet_lite0", pretrained_cfg_overlay={"file": weights})
    with learn.no_bar():
        learn.fine_tune(int(epochs))
    learn.export(learner)


def answer(learner: str, files: str, answers: str) -> None:
    learn = load_learner(learner)
    loader = learn.dls.test_dl([Path(file) for file in Path(files).read_text().splitlines()])
    with learn.no_bar():
        probabilities = learn.get_preds(dl=loader)[0]
    np.save(answers, probabilities.numpy().astype(np.float32))


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(*sys.argv[2:])
    else:
        answer(*sys.argv[2:])
