"""`python -m benchmarks.quality.lmms_task.utils FOLDER [SCENES]`: the task pruneops_scenes, for --include_path."""

import io
import shutil
import sys
from pathlib import Path

import numpy as np

from pruneops.demo import scenes

SEED = 11


def write(folder, count=40):
    """Write scenes.yaml and scenes.parquet: every question about `count` scenes of the test split.

    Parameters
    ----------
    folder : path
        Created if it does not exist.
    count : int
        Scenes.
    """
    import pyarrow
    from datasets import Features, Image, Value
    from pyarrow.parquet import write_table

    columns = {"image": Image(), "kind": Value("string"), "question": Value("string"), "answer": Value("string")}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(list(rows(count)), Features(columns).arrow_schema)
    write_table(table, folder / "scenes.parquet")
    shutil.copy(Path(__file__).with_name("scenes.yaml"), folder)


def rows(count):
    """The documents, one per question."""
    from PIL import Image

    for number in range(count):
        scene = scenes.scene("test", SEED, number)
        image = io.BytesIO()
        Image.fromarray(scene.pixels).save(image, "png")
        image = {"bytes": image.getvalue(), "path": None}
        for asked in scenes.questions(scene.objects, np.random.default_rng([SEED, number])):
            yield {"image": image, "kind": asked.kind, "question": asked.text, "answer": asked.answer}


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    write(sys.argv[1], *map(int, sys.argv[2:]))
