"""samples.md: prompts with both answers side by side, drawn by lot from wins, losses and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_kit.evaluate.win_rate.rates import Compared
from dpo_kit.model.chats import conversation_text
from dpo_kit.run.files import write_text
from dpo_kit.run.journal import key_of
from dpo_kit.run.report.markdown import fence, inline

EACH = 4  # of the losses, of the wins, of the rest
KINDS = (("loss",), ("win",), ("tie", "order-dependent"))


def write_samples(path: Path, compared: Sequence[Compared], *, policy: str, opponent: str) -> None:
    """Write the page; whatever stands in an answer stays inside its fence."""
    parts = [
        f"# {inline(policy)} and {inline(opponent)}, side by side\n\n"
        f"Up to {EACH} losses, {EACH} wins and {EACH} ties or order-dependent verdicts of the policy, drawn by lot out "
        f"of {len(compared)}.\n"
    ]
    for kinds in KINDS:
        some = [row for row in compared if row.verdict.outcome in kinds]
        for row in sorted(some, key=lambda row: key_of("samples", row.prompt_id, row.draw))[:EACH]:
            cells = [
                f'<td width="50%" valign="top">\n\n**{inline(name)}**{" (cut)" if answer and answer.cut else ""}\n\n'
                f"{fence(answer.text if answer else '')}\n\n</td>\n"
                for name, answer in ((policy, row.policy), (opponent, row.opponent))
            ]
            table = f"<table><tr>\n{''.join(cells)}</tr></table>"
            parts.append(f"## {row.verdict.outcome}\n\n{fence(conversation_text(row.prompt))}\n\n{table}\n")
    write_text(path, "\n".join(parts))
