"""Counts over the window against a plain recount."""

from __future__ import annotations

import pytest
import torch

from agg import DecayedTokenFrequency, TokenFrequency, VocabShard


def batches(steps: int, tokens: int = 30, vocab_size: int = 50) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    made = [(vocab_size * torch.rand(tokens, generator=generator) ** 2).long() for _ in range(steps)]
    for batch in made:
        batch[::7] = -100
    return made


def recount(window: list[torch.Tensor], vocab_size: int = 50, rows: int = 128) -> torch.Tensor:
    flat = torch.cat(window)
    return torch.bincount(flat[flat >= 0], minlength=rows)


@pytest.mark.parametrize("window", [1, 3, 100])
def test_counts_the_last_k_steps(window):
    frequency = TokenFrequency(VocabShard.of_rank(50, 0, 1), window)
    seen = batches(8)
    for step, batch in enumerate(seen):
        frequency.update(batch.view(5, 6))
        expected = recount(seen[max(0, step + 1 - window) : step + 1])
        assert torch.equal(frequency.appearances, expected)
        assert frequency.tokens == expected.sum()
        assert frequency.steps == min(step + 1, window)


def test_undo_takes_back_exactly_one_step():
    frequency = TokenFrequency(VocabShard.of_rank(50, 0, 1), 3)
    seen = batches(7)
    for batch in seen[:5]:
        frequency.update(batch)
    before = frequency.appearances.clone()
    frequency.update(seen[5])
    frequency.undo_update()
    assert torch.equal(frequency.appearances, before)
    with pytest.raises(RuntimeError, match="only the last one"):
        frequency.undo_update()
    frequency.update(seen[6])
    assert torch.equal(frequency.appearances, recount([seen[3], seen[4], seen[6]]))


@pytest.mark.parametrize("kind", [TokenFrequency, DecayedTokenFrequency])
def test_a_refused_step_leaves_nothing_to_take_back(kind):
    """The step before it must not be taken for it."""
    frequency = kind(VocabShard.of_rank(50, 0, 1), 4)
    frequency.update(torch.tensor([3]))
    frequency.update(torch.tensor([50]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        assert frequency.tokens
    with pytest.raises(RuntimeError, match="no update to take back"):
        frequency.undo_update()
    assert frequency.steps == 1 and frequency.tokens == 1


def test_a_shard_beyond_what_was_saved():
    """As when the vocabulary is padded to a multiple of the tensor-parallel degree, which then rises."""
    whole, beyond = VocabShard.of_rank(50, 0, 1), VocabShard(128, 192, 50)
    first, second = TokenFrequency(whole, 2), TokenFrequency(beyond, 2)
    for batch in batches(3):
        first.update(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches(5)[3:]:
        for one in (first, second):
            one.update(batch)
        assert first.tokens == second.tokens and not second.appearances.any()


def test_the_window_takes_eight_bytes_for_each_distinct_id_of_a_step():
    """And eight for the step's own total; 8 d ceil(K / R) is what PERFORMANCE.md plans with."""
    frequency, seen = TokenFrequency(VocabShard.of_rank(50, 0, 1), 4), batches(9)
    for batch in seen:
        frequency.update(batch)
    kept = frequency.state_dict()
    distinct = sum(len(batch[batch >= 0].unique()) for batch in seen[-4:])
    assert kept["rows"].nbytes + kept["counts"].nbytes == 8 * (distinct + 4)
    # A view of a slot's histogram would be as small, and keep all of it.
    held = [part.untyped_storage().nbytes() for slot in frequency._stored().values() for part in slot]
    assert sum(held) == 8 * (distinct + 4)


def test_a_rank_that_has_no_tokens_counts_none():
    frequency = TokenFrequency(VocabShard.of_rank(50, 0, 1), 4)
    frequency.update(torch.empty(0, 7, dtype=torch.int64))
    assert frequency.steps == 1 and frequency.tokens == 0 and not frequency.appearances.any()


@pytest.mark.parametrize("kind", [TokenFrequency, DecayedTokenFrequency])
def test_parts_that_do_not_fit_change_nothing(kind):
    """Parts are taken one at a time, and a rank that finds one wrong goes on with what it had."""
    whole, halves = VocabShard.of_rank(50, 0, 1), [VocabShard(64 * k, 64 * k + 64, 50) for k in range(2)]
    first, second = (kind(shard, 4) for shard in halves)
    frequency = kind(whole, 4)
    for batch in batches(5):
        for one in (first, second, frequency):
            one.update(batch)
    before = frequency.state_dict()
    parts = [first.state_dict(), second.state_dict()]
    for wrong in ([], [parts[1]], [parts[0], parts[1] | {"updates": 4}], [parts[0] | {"window_steps": 5}]):
        with pytest.raises(ValueError, match="saved token counts"):
            frequency.load_state_dict(part for part in wrong)
    frequency.load_state_dict(part for part in reversed(parts))
    after = frequency.state_dict()
    assert all(torch.equal(torch.as_tensor(after[key]), torch.as_tensor(before[key])) for key in ("totals", "updates"))
    assert kind is DecayedTokenFrequency or all(torch.equal(after[key], before[key]) for key in ("rows", "counts"))


@pytest.mark.parametrize("kind", [TokenFrequency, DecayedTokenFrequency])
@pytest.mark.parametrize("other_tokens", [30, 29])
def test_parts_of_two_runs_at_one_step_are_refused(kind, other_tokens):
    """As when fewer ranks save over what more had saved: with the totals of one and steps of the other, counts of
    tokens would fall below 0."""
    shard, saved = VocabShard.of_rank(50, 0, 1), []
    for first, tokens in ((0, 30), (4, other_tokens)):
        saved.append(kind(shard, 4))
        for batch in batches(8)[first : first + 4]:
            saved[-1].update(batch[-tokens:])
    frequency = kind(shard, 4)
    for parts in (saved, saved[::-1]):
        with pytest.raises(ValueError, match="parts of the saved token counts are of different runs"):
            frequency.load_state_dict(part.state_dict() for part in parts)
    assert frequency.steps == 0


def test_state_continues_the_window():
    seen = batches(9)
    whole, first = (TokenFrequency(VocabShard.of_rank(50, 0, 1), 4) for _ in range(2))
    for batch in seen[:6]:
        first.update(batch)
    second = TokenFrequency(VocabShard.of_rank(50, 0, 1), 4)
    second.load_state_dict(first.state_dict())
    for batch in seen[6:]:
        second.update(batch)
    for batch in seen:
        whole.update(batch)
    assert torch.equal(whole.appearances, second.appearances) and whole.tokens == second.tokens


class Elsewhere(torch.Tensor):
    """Not on the CPU, as far as one can see: what is made of it is one too, but for :meth:`cpu`."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_a_state_that_was_loaded_to_a_gpu_is_held_on_the_cpu():
    first, second = (TokenFrequency(VocabShard.of_rank(50, 0, 1), 4) for _ in range(2))
    for batch in batches(6):
        first.update(batch)
    state = first.state_dict()
    second.load_state_dict(
        {key: x.as_subclass(Elsewhere) if isinstance(x, torch.Tensor) else x for key, x in state.items()}
    )
    assert len(second._stored()) == 4
    assert all(type(part) is torch.Tensor for slot in second._stored().values() for part in slot)


@pytest.mark.parametrize("kind", [TokenFrequency, DecayedTokenFrequency])
def test_the_state_is_on_the_cpu_whatever_the_default_device(kind):
    first, second = (kind(VocabShard.of_rank(50, 0, 1), 4) for _ in range(2))
    for batch in batches(6):
        first.update(batch)
    with torch.device("meta"):  # where a trainer would name a GPU
        second.load_state_dict(first.state_dict())
        state = second.state_dict()
    assert {x.device.type for x in state.values() if isinstance(x, torch.Tensor)} == {"cpu"}
    assert torch.equal(state["totals"], first.state_dict()["totals"])


def test_exponential_window_fades():
    seen, frequency = batches(6), DecayedTokenFrequency(VocabShard.of_rank(50, 0, 1), 4)
    expected = torch.zeros(128, dtype=torch.float64)
    for step, batch in enumerate(seen):
        frequency.update(batch)
        expected = 0.75 * expected + recount([batch])
        assert torch.equal(frequency.appearances, expected)
        assert frequency.tokens.item() == pytest.approx(expected.sum().item(), rel=1e-14)
        assert frequency.steps == min(step + 1, 4)
    before = frequency.appearances.clone()
    frequency.update(seen[0])
    frequency.undo_update()
    assert torch.equal(frequency.appearances, before)
    with pytest.raises(RuntimeError, match="only the last one"):
        frequency.undo_update()
    again = DecayedTokenFrequency(VocabShard.of_rank(50, 0, 1), 4)
    again.load_state_dict(frequency.state_dict())
    assert torch.equal(again.appearances, before) and again.tokens == frequency.tokens


def test_a_steady_token_is_as_rare_in_both_windows():
    shard, batch = VocabShard.of_rank(50, 0, 1), batches(1)[0]
    rarities = []
    for kind in (TokenFrequency, DecayedTokenFrequency):
        frequency = kind(shard, 5)
        for _ in range(30):
            frequency.update(batch)
        rarities.append(frequency.appearances.double() / frequency.tokens)
    assert torch.allclose(*rarities, rtol=1e-12)


def test_one_kind_of_window_does_not_load_the_other():
    shard = VocabShard.of_rank(50, 0, 1)
    one, other = TokenFrequency(shard, 3), DecayedTokenFrequency(shard, 3)
    one.update(batches(1)[0])
    other.update(batches(1)[0])
    with pytest.raises(ValueError, match="window None, this run has exponential"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="window exponential, this run has None"):
        one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [-100, 3, 100])
def test_targets_of_any_integer_dtype(dtype, ignore_index):
    """Ids may not fit into as few bits as the targets have, and an id of the vocabulary may be the one to ignore."""
    frequency = TokenFrequency(VocabShard.of_rank(60_000, 0, 1), 2)
    ids = torch.tensor([[3, 49], [3, 7]], dtype=dtype)
    frequency.update(ids, ignore_index)
    counted = ids[ids != ignore_index].long()
    assert torch.equal(frequency.appearances, torch.bincount(counted, minlength=60_032))
    assert frequency.tokens == len(counted)


def test_bad_input():
    shard = VocabShard.of_rank(50, 0, 1)
    with pytest.raises(ValueError, match="window_steps is 0"):
        TokenFrequency(shard, 0)
    for bad in (50, 51, 10**9, 2**63 - 1, -1, -2, -(2**63)):
        frequency = TokenFrequency(shard, 2)
        frequency.update(torch.tensor([3, bad]))
        with pytest.raises(ValueError, match="1 targets of this step are outside the vocabulary of 50"):
            frequency.appearances  # noqa: B018
    frequency = TokenFrequency(shard, 2)
    with pytest.raises(ValueError, match="window_steps 3, this run has 2"):
        frequency.load_state_dict(TokenFrequency(shard, 3).state_dict())
