"""Batches in parts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rocket_fast.batch import Batch, PackedText


@given(samples=st.integers(2, 13), data=st.data())
def test_parts_of_a_batch_are_even_and_make_the_whole(samples: int, data: st.DataObject):
    parts, pictures = data.draw(st.integers(1, samples)), data.draw(st.integers(0, 9))
    captions = [list(range(1, 2 + i % 4)) for i in range(samples)]
    batch = Batch(
        images=(torch.arange(samples * 3).view(samples, 3, 1, 1), torch.arange(samples * 12).view(samples, 3, 2, 2)),
        texts=(PackedText.from_ids(captions), PackedText.from_ids(captions[::-1])),
        keys=tuple(f"key {i}" for i in range(samples)),
        valid=torch.arange(samples) % 3 > 0,
        captions=tuple(map(str, captions)),
        unpaired=(torch.arange(2 * pictures).view(pictures, 2, 1, 1),) * 2,
    )
    split = batch.split(parts)
    assert len(split) == parts
    for sizes in ([len(part) for part in split], [len(part.unpaired[0]) for part in split]):
        assert max(sizes) - min(sizes) <= 1
    for view in range(2):
        assert torch.equal(torch.cat([part.unpaired[view] for part in split]), batch.unpaired[view])
    assert sum((part.keys for part in split), ()) == batch.keys
    assert sum((part.captions for part in split), ()) == batch.captions
    assert torch.equal(torch.cat([part.valid for part in split]), batch.valid)
    for view in range(2):
        assert torch.equal(torch.cat([part.images[view] for part in split]), batch.images[view])
        whole = PackedText.cat([part.texts[view] for part in split])
        assert torch.equal(whole.tokens, batch.texts[view].tokens)
        assert torch.equal(whole.lengths, batch.texts[view].lengths)
        assert all(len(part.texts[view]) == len(part) for part in split)
        assert all(part.texts[view].longest == int(part.texts[view].lengths.max()) for part in split)
