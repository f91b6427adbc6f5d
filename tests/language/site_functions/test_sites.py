"""The plain definitions of what a site can do, against torch and numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftsurgery.language.site_functions import sites


def test_attention_is_softmax_of_scores_over_the_keys_that_heads_share() -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.randn(2, 1, 3, 5)
    keys, values = (x.numpy()[:, [0, 0, 1, 1]] for x in (k, v))
    scores = q.numpy() @ keys.swapaxes(-1, -2) / np.sqrt(8) + mask.numpy()
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (shares / shares.sum(-1, keepdims=True)) @ values
    np.testing.assert_allclose(sites.attention(q, k, v, mask).numpy(), expected, atol=1e-5)


def test_new_keys_come_first_for_every_sequence_and_every_query_sees_them() -> None:
    P, k = torch.randn(3, 2, 8), torch.randn(4, 2, 5, 8)
    joined = sites.concat(sites.tokens(P), k)
    for sequence in range(4):
        assert torch.equal(joined[sequence, :, 3:], k[sequence])
        assert torch.equal(joined[sequence, :, :3], P.transpose(0, 1))
    mask = torch.full((1, 1, 2, 5), -1e9)
    assert sites.extend(mask, 3).tolist()[0][0] == [[0.0] * 3 + [-1e9] * 5] * 2
    assert sites.extend(None, 3) is None
    assert sites.unmasked(k).tolist() == [[[[0.0] * 5]]]


@pytest.mark.parametrize("shape", [(2, 3), (4, 5, 3), (2, 4, 5, 3)])
def test_the_mean_is_over_the_tokens_and_leaves_one(shape: tuple[int, ...]) -> None:
    v = torch.randn(shape)
    found = sites.token_mean(v)
    if len(shape) == 2:  # a row is a sequence of one token
        assert torch.equal(found, v)
    else:
        torch.testing.assert_close(found, v.mean(-2, keepdim=True), rtol=0, atol=1e-6)


def test_positions_after_a_prefix_are_those_that_count_up_to_them() -> None:
    assert sites.precede(torch.tensor([4, 5, 6]), 3).tolist() == [1, 2, 3, 4, 5, 6]
    assert sites.precede(torch.tensor([[7], [2]]), 2).tolist() == [[5, 6, 7], [0, 1, 2]]


def test_the_norm_of_a_sum_is_a_layer_norm_without_weights() -> None:
    h = torch.randn(2, 3, 8)
    torch.testing.assert_close(sites.norm(h), F.layer_norm(h, (8,)))


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "words"),
    [
        ((1, 3, 2, 8), (1, 2, 2, 8), (1, 2, 2, 8), None, "queries have 3 heads"),
        ((1, 4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8), None, "keys have 3 heads"),
        ((1, 4, 2, 8), (1, 2, 2, 8), (1, 1, 2, 8), None, "values have 1 heads"),
        ((1, 4, 2, 8), (1, 2, 5, 8), (1, 2, 4, 8), None, "4 values for so many keys: 5"),
        ((1, 4, 2, 8), (1, 2, 5, 8), (1, 2, 5, 8), (1, 1, 2, 4), "for 4 keys, and there are 5"),
    ],
)
def test_a_core_takes_no_more_than_a_model_s_would(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], mask: object, words: str
) -> None:
    attend = sites.core(4, 2, None)["attention"].function
    given = None if mask is None else torch.zeros(mask)
    with pytest.raises(ValueError, match=words):
        attend(torch.zeros(q), torch.zeros(k), torch.zeros(v), given)


def test_a_core_s_own_mask_is_for_the_keys_that_there_were() -> None:
    attend = sites.core(2, 2, torch.zeros(1, 1, 3, 3))["attention"].function
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="extend"):
        attend(q, k, k)
    assert attend(q, k[:, :, :3], k[:, :, :3]).shape == q.shape
