"""What the untrained reference itself prefers: a pair that it already ranks as labelled teaches little."""

import statistics
from typing import Any

from dpo_kit.config.settings import Settings
from dpo_kit.data.rows import Rows
from dpo_kit.run.intervals import wilson


def reference_margins(rows: Rows, settings: Settings, tokenizer: Any) -> list[tuple[float, float]]:
    """Log-probability of chosen less that of rejected (nats; cut as in training) by the reference: summed, by token."""
    import torch

    from dpo_kit.model.hardware import has_accelerator
    from dpo_kit.model.load import load_reference
    from dpo_kit.model.scoring import score
    from dpo_kit.model.tokens import Truncation
    from dpo_kit.run.quiet import quiet_libraries

    quiet_libraries()
    model = load_reference(settings.model)
    if has_accelerator() and settings.model.tuning != "qlora":
        model = model.to("cuda")  # type: ignore[arg-type]
    cut, sequences = Truncation.of(settings.trl).cut, []
    for row in rows:
        prompt, *answers = (row["ids"][name].tolist() for name in ("prompt", "chosen", "rejected"))
        sequences += [cut(prompt, answer) for answer in answers]
    with torch.no_grad():
        logps = score(model, sequences, pad_id=tokenizer.pad_token_id, description="asking the reference").tolist()
    by_token = [logp / max(1, len(answer)) for logp, (_, answer) in zip(logps, sequences, strict=True)]
    return [(logps[i] - logps[i + 1], by_token[i] - by_token[i + 1]) for i in range(0, len(logps), 2)]


def measure_preference(margins: list[tuple[float, float]]) -> dict[str, float]:
    """How often the reference ranks a pair as labelled (Wilson 95 % intervals); median summed margin in nats."""
    measures: dict[str, float] = {"pairs": len(margins)}
    for place, name in enumerate(("accuracy", "accuracy_per_token")):
        share = statistics.fmean(0.5 * ((pair[place] > 0) + (pair[place] >= 0)) for pair in margins)
        low, high = wilson(share, len(margins))
        measures |= {name: share, f"{name}_low": low, f"{name}_high": high}
    return measures | {"median_margin_nats": statistics.median(pair[0] for pair in margins)}
