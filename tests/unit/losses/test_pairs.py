"""What pairs have in common: the tokens that are run once for both sides."""

import torch

from llm_trainer.losses.pairs import MIN_SHARED, num_shared

# prompt and chosen answer, prompt and rejected answer, tokens of the rejected side before its first label, what is shared
PAIRS = [
    ([1, 2, 3, 4], [1, 2, 3, 5], 3, 2),  # up to the token before the first label
    ([1, 2, 3, 4], [1, 2, 3, 4], 1, 0),  # the token before the first label is the first one
    ([1, 9, 3, 4], [1, 2, 3, 5], 3, 1),  # they differ earlier
    ([7, 8], [1, 2, 3, 5, 6], 4, 0),
    ([1, 2], [1, 2, 3, 4, 5], 4, 2),  # one is the beginning of the other
    ([5] + [1] * 99, [5] + [2] * 99, 50, 0),  # one token of 200 is not worth a branch
    ([1, 2, 3], [1, 2, 3], 0, 0),  # a label on the first token is none: the next one counts
]


def test_what_is_shared_of_each_pair_whatever_stands_beside_it() -> None:
    assert MIN_SHARED * 200 > 1
    for pairs in (PAIRS, *([pair] for pair in PAIRS)):
        chosen, rejected, prompts, expected = zip(*pairs, strict=True)
        labels = [torch.arange(len(ids)) >= prompt for ids, prompt in zip(rejected, prompts, strict=True)]
        found = num_shared(
            torch.cat([torch.tensor(ids) for ids in chosen]),
            torch.tensor([len(ids) for ids in chosen]),
            torch.cat([torch.tensor(ids) for ids in rejected]),
            torch.tensor([len(ids) for ids in rejected]),
            torch.cat(labels),
        )
        assert found.tolist() == list(expected)
