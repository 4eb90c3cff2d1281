"""Zero-shot scores against the definition, by hand and in float64."""

import pytest
import torch
import torch.nn.functional as F

from rocket_fast.zeroshot import Z_WEIGHTS, Encoded, classify, encode_classes, pixel_neighbour, similarity


def encoded(rows: int, *, h: bool = True, seed: int = 0) -> Encoded:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(2, rows, 6, generator=generator)
    return Encoded.of(raw[0], raw[1] if h else None)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_score_is_the_weighted_cosine(weight: float):
    pictures, classes = encoded(4), encoded(3, seed=1)
    expected = torch.empty(4, 3)
    for i in range(4):
        for j in range(3):
            z = F.cosine_similarity(pictures.z[i], classes.z[j], dim=0)
            h = F.cosine_similarity(pictures.h[i], classes.h[j], dim=0)
            expected[i, j] = weight * z + (1 - weight) * h
    torch.testing.assert_close(similarity(pictures, classes, weight), expected)


def test_without_head_h_only_z_counts():
    pictures, classes = encoded(5, h=False), encoded(4, h=False, seed=1)
    assert torch.equal(similarity(pictures, classes, 0.3), similarity(pictures, classes, 1.0))
    accuracy = classify(pictures, classes, torch.zeros(5, dtype=torch.long))
    assert set(accuracy.top1) == {1.0}


def test_accuracy_counts_hits_for_every_weight():
    classes = encoded(12)
    labels = torch.arange(12)
    perfect = classify(classes, classes, labels)
    assert set(perfect.top1) == set(Z_WEIGHTS)
    assert all(value == 100 for value in (*perfect.top1.values(), *perfect.top5.values()))
    wrong = labels.clone()
    wrong[:3] = (labels[:3] + 1) % 12
    assert classify(classes, classes, wrong).top1[1.0] == pytest.approx(75.0)


def test_fewer_than_five_classes():
    classes = encoded(2)
    accuracy = classify(classes, classes, torch.arange(2))
    assert (accuracy.top5[0.5], accuracy.classes) == (100, 2)


def test_classes_average_normalised_templates_then_normalise():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(2))

        def encode_text(self, text):
            return torch.stack([text.tokens.float(), 1 + 3 * text.lengths.float()], 1), None

    class Tokenizer:
        def pack(self, texts):
            from rocket_fast.batch import PackedText

            return PackedText.from_ids([[len(text)] for text in texts])

    off = torch.autocast("cpu", enabled=False)
    classes = encode_classes(Model(), Tokenizer(), ["cat", "horse"], ["{}", "a {}"], off)
    for row, name in enumerate(("cat", "horse")):
        units = [F.normalize(torch.tensor([float(len(t)), 4.0]), dim=0) for t in (name, f"a {name}")]
        torch.testing.assert_close(classes.z[row], F.normalize(torch.stack(units).mean(0), dim=0))


def test_pixel_neighbour_finds_the_nearest_and_never_itself():
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 200, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
    close = base + 5
    assert pixel_neighbour([close], ["a", "b", "c"], [base[:2], base[2:]], ["a", "b", "x"]) == pytest.approx(200 / 3)
    both = torch.cat([base, close])
    assert pixel_neighbour([both], list("abcabc"), [both], list("abcabc"), same_set=True) == 100
    assert pixel_neighbour([base], list("abc"), [base], list("abc"), same_set=True) == 0
