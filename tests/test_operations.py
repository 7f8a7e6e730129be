"""A training step dispatches fewer operations than TRL's on padded rows, a GPU's attention taken."""

import re
import runpy
from pathlib import Path

import torch

SCRIPT = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "benchmark" / "operations.py"))
PADDED = {"padded TRL": SCRIPT["ARMS"]["padded TRL"]}


def test_a_step_dispatches_a_seventh_less_than_on_padded_rows_and_waits_no_oftener_for_the_device():
    steps = SCRIPT["measure"]({"layers": "4", "steps": "1"}, PADDED)
    assert SCRIPT["total"](steps["dpo_kit"]) <= 0.85 * SCRIPT["total"](steps["padded TRL"])
    waits = {who: sum(found[0][2].values()) for who, found in steps.items()}
    assert 0 < waits["dpo_kit"] <= waits["padded TRL"]


def test_counted_is_what_launches_a_kernel_forward_and_backward_and_a_wait_with_its_line():
    counting = SCRIPT["Counting"]()
    weight = torch.ones(3, requires_grad=True)
    with counting:
        counting.next_step()
        loss = (weight.view(1, 3) * torch.empty(3).fill_(2.0)).sum()
        loss.backward()
        with counting.as_one("kernel"):
            weight.detach().exp().log()
        assert loss.item() == 6
        counting.next_step()
    ((operations, _, waits),) = counting.steps
    assert operations == {"fill_": 1, "mul": 2, "sum": 1, "ones_like": 1, "kernel": 1}
    assert re.fullmatch(r"_local_scalar_dense at tests/test_operations.py:\d+", *waits)
