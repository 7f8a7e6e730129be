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
    chosen = [each for kinds in KINDS for each in _draw_lots(compared, kinds)]
    head = (
        f"# {inline(policy)} and {inline(opponent)}, side by side\n\n"
        f"Up to {EACH} losses, {EACH} wins and {EACH} ties or order-dependent verdicts of the policy, drawn by lot out "
        f"of {len(compared)}.\n"
    )
    write_text(path, "\n".join([head, *(_sample(each, policy, opponent) for each in chosen)]))


def _draw_lots(compared: Sequence[Compared], kinds: Sequence[str]) -> list[Compared]:
    some = [each for each in compared if each.verdict.outcome in kinds]
    return sorted(some, key=lambda each: key_of("samples", each.prompt_id, each.draw))[:EACH]


def _sample(each: Compared, policy: str, opponent: str) -> str:
    cells = [
        f'<td width="50%" valign="top">\n\n**{inline(name)}**{" (cut)" if answer and answer.cut else ""}\n\n'
        f"{fence(answer.text if answer else '')}\n\n</td>"
        for name, answer in ((policy, each.policy), (opponent, each.opponent))
    ]
    table = "\n".join(["<table><tr>", *cells, "</tr></table>"])
    return f"## {each.verdict.outcome}\n\n{fence(conversation_text(each.prompt))}\n\n{table}\n"
