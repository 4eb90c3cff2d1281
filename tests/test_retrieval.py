"""Retrieval counts, and the picture: the right captions in green, whatever the texts hold."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rocket_fast.retrieval import PictureSample, captions_picture, distinct_rows, recall_at_1
from rocket_fast.zeroshot import Encoded


def test_distinct_rows_take_each_caption_once_and_spread():
    rows = distinct_rows(["a", "b", "a", "c", "b", "d"], most=10)
    assert rows.tolist() == [0, 1, 3, 5]
    spread = distinct_rows([str(i) for i in range(101)], most=5)
    assert spread.tolist() == [0, 25, 50, 75, 100]


@pytest.mark.parametrize(("distinct", "stride"), [(3, 1), (5, 1), (10, 1), (11, 2), (100, 16), (1000, 128)])
def test_pictures_of_a_stream_are_few_distinct_and_spread(distinct: int, stride: int):
    captions = [f"caption {i // 2}" for i in range(2 * distinct)]
    images = torch.arange(2 * distinct, dtype=torch.int32)[:, None, None, None].expand(-1, 3, 4, 4)
    sample = PictureSample(5)
    for start in range(0, len(captions), 7):
        sample.add(images[start : start + 7], captions[start : start + 7])
        assert len(sample._kept) <= 10
        assert all(image.untyped_storage().nbytes() == 3 * 4 * 4 * 4 for _, image in sample._kept)
    rows, pictures = sample.chosen()
    assert len(rows) == min(5, distinct)
    assert pictures[:, 0, 0, 0].tolist() == rows.tolist()
    assert rows[0] == 0
    assert all(row % (2 * stride) == 0 for row in rows.tolist())
    assert rows[-1] >= 2 * distinct - 2 * stride
    gaps = rows.diff()
    assert gaps.max() <= 2 * gaps.min()


def test_no_picture_at_all_is_an_error():
    with pytest.raises(ValueError, match="pictures"):
        PictureSample(5).chosen()


def test_recall_counts_own_rows():
    vectors = torch.eye(4)
    pictures = Encoded.of(vectors, None)
    assert recall_at_1(pictures, Encoded.of(vectors, None), 0.5) == 100
    assert recall_at_1(pictures, Encoded.of(vectors[[1, 0, 2, 3]], None), 0.5) == pytest.approx(50)


def test_picture_marks_the_right_caption(tmp_path: Path):
    images = torch.zeros(3, 3, 20, 20, dtype=torch.uint8)
    best = [[("cat", 0.9), ("dog", 0.2)], [("ox", 0.5), ("a very long caption " * 9, 0.4)], [("é 漢", 0.1)]]
    paths = [tmp_path / "with.png", tmp_path / "without.png"]
    captions_picture(images, ["cat", "eel", "é 漢"], best, paths[0], "title")
    captions_picture(images, ["pig", "eel", "fox"], best, paths[1], "title")
    greens = [int(((p := np.array(Image.open(path)).astype(int))[..., 1] > p[..., 0] + 60).sum()) for path in paths]
    assert greens[0] > 50
    assert greens[1] == 0
