import numpy as np
import pytest
import torch

from tinyflow.errors import InputError
from tinyflow.picturebook import world
from tinyflow.picturebook.model import LENGTH
from tinyflow.tokenizer import WordTokenizer


@pytest.fixture
def tokenizer():
    return WordTokenizer(world.VOCABULARY, LENGTH)


def test_every_caption_the_world_can_say_is_known(tokenizer):
    rng = np.random.default_rng(0)
    texts = [world.random_caption(world.random_scene(rng), rng) for _ in range(500)]
    ids, slots, phrases = tokenizer(texts)
    assert ids.shape == (500, LENGTH) and not slots.any() and not phrases.any()
    assert (ids[:, 0] == tokenizer.start).all()
    assert any(text == "" for text in texts) and any(" robot robot" in text for text in texts)


def test_the_placeholder_is_read_as_its_stand_in_and_its_place_is_reported(tokenizer):
    ids, slots, phrases = tokenizer(["a big [V] robot in the snow."], {"[V]": "robot"})
    assert torch.equal(ids, tokenizer(["a big robot robot in the snow"])[0])
    assert slots[0].nonzero().flatten().tolist() == [3]
    assert phrases[0].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def test_an_unknown_word_is_named_with_its_nearest_neighbours(tokenizer):
    with pytest.raises(InputError, match="'robott'.*robot"):
        tokenizer(["a red robott"])
    with pytest.raises(InputError, match="at most 42"):
        tokenizer(["robot " * 43])


def test_pooling_is_at_the_first_end_token_and_attention_is_causal(pipe):
    ids = pipe.tokenizer(["a red robot"]).ids
    context, pooled = pipe.encoder(ids)
    changed = ids.clone()
    changed[0, 6:] = 7                           # after the first end: it has no effect on the pooled vector
    context_changed, pooled_changed = pipe.encoder(changed)
    torch.testing.assert_close(pooled_changed, pooled)
    torch.testing.assert_close(context_changed[:, :6], context[:, :6])
    changed = ids.clone()
    changed[0, 2] = 7
    assert not torch.allclose(pipe.encoder(changed)[1], pooled)
