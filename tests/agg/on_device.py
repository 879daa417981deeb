"""``python -m tests.agg.on_device``: the loss and the counts on a GPU, against the CPU; prints what it saw.

The suite runs the same checks with the CPU as the device, as it must pass without a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from agg import AdaptiveGradientGating, Gates, gated_linear_cross_entropy
from tests.agg.problems import Problem, make_problem, rounded, transposed, weigh, well_predicted
from tests.agg.test_logit_options import dense
from tests.distributed import run_ranks
from tests.invariance.agg_layouts import OPTIONS as STEP_OPTIONS
from tests.invariance.agg_layouts import errors, papers_answer, part_of_step, wrong

Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # loss, dH, dW
OPTIONS: tuple[dict[str, Any], ...] = (
    {"chunk_tokens": 61},
    {"chunk_tokens": 61, "reduction": "none", "label_smoothing": 0.1},
    {"reduction": "sum", "z_loss": 0.01},
    {"soft_cap": 20.0},
    {"gated": False},
)


KINDS = ((torch.float32, torch.clone), (torch.bfloat16, transposed), (torch.float16, torch.clone))


def answer(
    problem: Problem,
    device: str,
    dtype: torch.dtype,
    laid_out: Callable[[torch.Tensor], torch.Tensor],
    gated: bool = True,
    **options: Any,
) -> Answer:
    hidden = laid_out(problem.hidden.to(device, dtype)).detach().requires_grad_()
    weight = laid_out(problem.weight.to(device, dtype)).detach().requires_grad_()
    gates = Gates(*(getattr(problem.gates, name).to(device) for name in ("rare", "g1", "g2", "rare_ids")))
    shard = problem.shard(0, 1)
    given = (hidden, weight, problem.target.to(device), gates if gated else None, shard)
    loss = gated_linear_cross_entropy(*given, **options)
    weigh(loss).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach().cpu(), hidden.grad.cpu(), weight.grad.cpu()


def check_loss(device: str) -> str:
    """Error budget: that of the CPU in the same dtype against the paper's form in fp64, plus 20 % and one eps (float32:
    four). As norms of matrices: the largest error of an entry differs by more when a sum is taken in another order.
    """
    worst = 0.0
    for vocab_size, kind in itertools.product((507, 4_096), (lambda problem: problem, well_predicted)):
        problem = kind(make_problem(tokens=400, hidden_size=64, vocab_size=vocab_size, ignored=0.2))
        for (dtype, laid_out), options in itertools.product(KINDS, OPTIONS):
            inputs = rounded(problem, dtype)
            masked = dataclasses.replace(inputs, hidden=inputs.hidden.clone())
            masked.hidden[problem.target == -100] = torch.nan  # takes no part
            exact = dense(inputs, **{"gated": True, **options, "chunk_tokens": None})
            mine = answer(masked, device, dtype, laid_out, **options)
            plain = answer(inputs, "cpu", dtype, torch.clone, **options)
            for name, got, reference, truth in zip(("loss", "dH", "dW"), mine, plain, exact, strict=True):
                error, own = ((x.double() - truth).norm() / truth.norm() for x in (got, reference))
                budget = 1.2 * own + max(torch.finfo(dtype).eps, 4 * torch.finfo(torch.float32).eps)
                worst = max(worst, float(error / budget))
                assert error <= budget, f"{name}, V {vocab_size}, {dtype}, {options}: {error:.1e} > {budget:.1e}"
    return f"errors at most {worst:.2f} of their budgets"


def check_repeats(device: str) -> str:
    """The same bits each time: what is added to a row of dW is added in one order."""
    problem = make_problem(tokens=4_000, hidden_size=64)
    runs = [answer(problem, device, torch.bfloat16, torch.clone, chunk_tokens=512) for _ in range(5)]
    assert all(torch.equal(one, first) for run in runs for one, first in zip(run, runs[0], strict=True))
    return "five runs are equal to the bit"


@contextmanager
def refusing_waits(device: str) -> Iterator[None]:
    """On a GPU an operation that waits for it is an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def check_waits(device: str) -> str:
    """A whole step, after the first that compiles kernels and moves what lies on the host; the window overflows."""
    problem = make_problem()
    target = problem.target.to(device)
    hidden, weight = (x.to(device, torch.bfloat16).requires_grad_() for x in (problem.hidden, problem.weight))
    for window in ("sliding", "exponential"):
        loss_of = AdaptiveGradientGating(
            problem.shard(0, 1), rare_fraction=0.3, window_steps=2, window=window, excluded_ids=(1,)
        )
        loss_of.begin_step(target)
        loss_of(hidden, weight, target).backward()
        with refusing_waits(device):
            for _ in range(4):
                loss_of.begin_step(target)
                loss_of(hidden, weight, target).backward()
        assert int(loss_of.frequency.steps) == 2
    return "a step waits for nothing" if device == "cuda" else "steps run"


def check_errors(device: str) -> str:
    """In words, a step late at most."""
    problem = make_problem()
    hidden, weight, target = (x.to(device) for x in (problem.hidden, problem.weight, problem.target))
    loss_of = AdaptiveGradientGating(problem.shard(0, 1), alpha=0.3, window_steps=3)
    target[5] = 507
    try:
        for _ in range(2):
            loss_of(hidden, weight, target)
    except ValueError as error:
        assert "1 targets of this step are outside the vocabulary of 507 ids" in str(error)
        return "a wrong target is told in words"
    raise AssertionError("a target outside the vocabulary was counted")


def check_ranks(device: str) -> str:
    """2 data-parallel x 2 tensor-parallel ranks, all on one device: gloo, as NCCL wants a GPU for each of them.

    Counts and gates exactly, fp64 (without Triton) to 1e-12; fp32, as on a CPU, to half more than the paper's form.
    """
    exact = papers_answer()
    plain = errors(papers_answer(dtype=torch.float32), exact)
    budget = {name: 1.5 * error + torch.finfo(torch.float32).eps for name, error in plain.items()}
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, budget)):
        step = (2, 2, (5, 1, 2), dtype, STEP_OPTIONS, device)
        parts = run_ranks(part_of_step, 4, *step, method="fork" if device == "cpu" else "spawn")
        assert (off := wrong(parts, exact, tolerance)) == set(), f"{dtype}: {', '.join(off)}"
    return "2 x 2 ranks equal one process"


CHECKS = (check_loss, check_repeats, check_waits, check_errors, check_ranks)


def main() -> int:
    if not torch.cuda.is_available():
        print("no GPU here; the suite runs these checks on the CPU")
        return 2
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    failed = 0
    for check in CHECKS:  # the others are told, whatever becomes of one
        try:
            print(f"{check.__name__}: {check('cuda')}", flush=True)
        except Exception:
            failed += 1
            print(f"{check.__name__}: FAILED\n{traceback.format_exc()}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
