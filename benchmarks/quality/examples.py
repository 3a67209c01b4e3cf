"""Questions about scenes as examples for training: one of the kinds in turn for every scene."""

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from pruneops.demo import scenes
from pruneops.training.data import Example


class Questions(Dataset):
    """Example i asks a question of kind i % 5 about scene i.

    Parameters
    ----------
    count, seed : int
        Scenes of a series.
    split : {"train", "test"}
    """

    def __init__(self, count, seed=9, split="train"):
        self.count, self.seed, self.split = count, seed, split

    def __len__(self):
        return self.count

    def __getitem__(self, number):
        scene = scenes.scene(self.split, self.seed, number)
        rng = np.random.default_rng([self.seed, number, 13])
        kind = scenes.KINDS[number % len(scenes.KINDS)]
        asked = [question for question in scenes.questions(scene.objects, rng) if question.kind == kind]
        question = asked[rng.integers(len(asked))]
        return Example(Image.fromarray(scene.pixels), question.text, question.answer)
