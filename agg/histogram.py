"""How often each row of a vocabulary shard is a target in one optimizer step, and what is wrong with that step.

Letters: V vocabulary, V_local rows of this rank's vocabulary shard.
"""

from __future__ import annotations

import torch

from agg.vocab_shard import VocabShard

# Behind the counts of a step's histogram: what each number above 0 raises on all data-parallel ranks.
COMPLAINTS: tuple[tuple[type[Exception], str], ...] = (
    (ValueError, "{count} targets of this step are outside the vocabulary of {vocab_size} ids"),
    (
        FloatingPointError,
        "the loss of the step before was not finite on {count} data-parallel ranks; hidden states or weights hold "
        "NaN or infinity, or on a GPU a target was outside the vocabulary and not among the counted",
    ),
    (ValueError, "{count} data-parallel ranks could not take part in this step; their own messages say why"),
)
# And behind these: how many steps a rank has counted, which must be as many on all.
NEWS = len(COMPLAINTS) + 1
STEPS_MODULO = 2**16  # so that the sum over ranks fits into an int32


def step_histogram(targets: torch.Tensor, places: torch.Tensor, size: int, ignore_index: int) -> torch.Tensor:
    """
    Args:
        places: of :func:`places_of_ids`. size: V_local.

    Returns:
        int32 [V_local + 5]: occurrences of each row; how many targets; how many outside the vocabulary; 0, 0, 0.
    """
    flat = targets.reshape(-1).long()
    place = places[flat.clamp(-1, len(places) - 2)].masked_fill_(flat == ignore_index, size + 2)
    histogram = torch.zeros(size + 1 + NEWS, dtype=torch.int32, device=targets.device)
    histogram.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
    counted, _, ignored, *_ = histogram[size:].unbind()
    counted.fill_(len(flat)).sub_(ignored)
    ignored.zero_()
    return histogram


def places_of_ids(shard: VocabShard, device: torch.device) -> torch.Tensor:
    """int32 [V + 2]: where :func:`step_histogram` counts each id, any id above them, and any below 0 (index -1).

    Ids that are held elsewhere or do not exist have places of their own: picking them out would make a GPU wait.
    """
    elsewhere, outside = len(shard), len(shard) + 1
    places = torch.full((shard.vocab_size + 2,), elsewhere, dtype=torch.int32, device=device)
    places[shard.start : shard.start + shard.real] = torch.arange(shard.real, device=device)
    places[shard.vocab_size :] = outside
    return places
