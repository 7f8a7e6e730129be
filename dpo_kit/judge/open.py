"""Judges of answers as config options: a gold function, a reward model, a language model, people (review.py).

Data building and evaluation both open one here and ask it through `verdicts.compare`, which shows every pair in both
orders.
"""

import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dpo_kit.config.extensions import find_gold
from dpo_kit.config.settings import COST_ONLY, GoldJudge, LLMJudge, RewardModelJudge
from dpo_kit.config.settings import Judge as JudgeSettings
from dpo_kit.errors import ConfigError, DataError, JudgeError
from dpo_kit.judge.review import ReviewSheet
from dpo_kit.judge.server import Reply, Request, Server
from dpo_kit.judge.verdicts import Judge, Raw, Shown
from dpo_kit.model.chats import Prompt
from dpo_kit.run.files import hash_weights
from dpo_kit.run.journal import Journal, key_of
from dpo_kit.run.redact import redact_text

Score = Callable[[Sequence[Prompt], Sequence[str]], list[float]]
PROTOCOL = Path(__file__).with_name("protocol.txt").read_text(encoding="utf-8")
LEAST = 4  # replies without a verdict from which on a judge is given up
VERDICT = re.compile(r"VERDICT: (1|2|TIE)")
RAW: dict[str | None, Raw] = {"1": "first", "2": "second", "TIE": "tie"}


@contextmanager
def open_judge(settings: JudgeSettings, folder: Path, seed: int = 0) -> Iterator[Judge]:
    """The judge that `settings` (the group `judge`) describes; what it says is kept in `folder` and never paid twice.
    `seed` places the answers on a review sheet. Raises ConfigError, ModelError.
    """
    with Journal(folder / "judgements.jsonl") as journal:
        if isinstance(settings, GoldJudge):
            yield ScoringJudge(f"gold {settings.module}", _gold(settings.module), settings.tie_margin)
        elif isinstance(settings, RewardModelJudge):
            yield ScoringJudge(f"reward model {settings.path}", _rewards(settings, journal), settings.tie_margin)
        elif isinstance(settings, LLMJudge):
            yield LanguageModelJudge(settings, journal)
        else:
            yield ReviewSheet(folder / "review.csv", settings.sheets, seed)


def judge_identity(settings: JudgeSettings) -> dict[str, Any]:
    """What a judge's verdicts depend on: other settings under the same identity change speed and cost only."""
    values = settings.model_dump(exclude=set(COST_ONLY))
    if isinstance(settings, LLMJudge):
        values["rubric"] = key_of(read_rubric(settings.rubric))
    if isinstance(settings, RewardModelJudge):
        values["path"] = hash_weights(settings.path) or settings.path
    return values


class ScoringJudge(Judge):
    """A judge that gives each answer a number; two answers within `tie_margin` are a tie, in whatever order."""

    def __init__(self, name: str, score: Score, tie_margin: float) -> None:
        self.name, self.score, self.tie_margin = name, score, tie_margin

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        answers = {key_of(s.prompt, answer): (s.prompt, answer) for s in shown for answer in (s.first, s.second)}
        scores = self.score([prompt for prompt, _ in answers.values()], [answer for _, answer in answers.values()])
        values = dict(zip(answers, scores, strict=True))
        gaps = [values[key_of(s.prompt, s.first)] - values[key_of(s.prompt, s.second)] for s in shown]
        return ["tie" if abs(gap) <= self.tie_margin else "first" if gap > 0 else "second" for gap in gaps]

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return self.score(prompts, answers)


def _gold(name: str) -> Score:
    """The `gold_rewards` of the module `name`."""
    module = find_gold(name, "judge.module", ["gold_rewards"])

    def score(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        try:
            return module.gold_rewards(prompts, answers)
        except ValueError as error:
            raise DataError(f"judge.module={name} cannot judge these prompts: {error}") from error

    return score


def _rewards(settings: RewardModelJudge, journal: Journal) -> Score:
    """The scores of a reward model, which is loaded once something is to be scored."""
    weights = hash_weights(settings.path) or f"{settings.path}@{settings.revision}"

    @cache
    def model() -> Any:
        from dpo_kit.judge.reward_model import RewardModel

        return RewardModel(settings)

    def score(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        rows = list(zip(prompts, answers, strict=True))
        keys = [key_of("reward", weights, settings.max_length, *row) for row in rows]
        missing = [(key, *row) for key, row in dict(zip(keys, rows, strict=True)).items() if key not in journal.rows]
        for start in range(0, len(missing), settings.batch_size):
            new, *texts = map(list, zip(*missing[start : start + settings.batch_size], strict=True))
            journal.add_all({key: {"score": value} for key, value in zip(new, model().score(*texts), strict=True)})
        return [journal.rows[key]["score"] for key in keys]

    return score


class LanguageModelJudge(Judge):
    """A model behind an OpenAI-compatible server that compares answers by the rubric in a text file: fenced answers, a
    verdict that is one of three exact lines.
    """

    def __init__(self, settings: LLMJudge, journal: Journal) -> None:
        self.name = f"llm {settings.model}"
        self.settings = settings
        self.instructions = read_rubric(settings.rubric).strip() + "\n" + PROTOCOL
        self.server = Server(settings, journal)

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        """JudgeError where most replies hold no verdict: as ties they would look like a result."""
        requests = [fenced(self.settings, "llm", self.instructions, each.parts, each) for each in shown]
        replies = self.server.ask(requests, "verdicts")
        verdicts = [read_verdict(reply) for reply in replies]
        unread = [reply for reply, raw in zip(replies, verdicts, strict=True) if reply and raw == "unparsable"]
        if len(unread) >= LEAST and 2 * len(unread) > len(replies):
            cut, limit = sum(reply.cut for reply in unread), self.settings.max_tokens
            raise JudgeError(
                f"{self.name} keeps to no form of verdict: {len(unread)} of {len(replies)} replies do not end in "
                f"VERDICT: 1, VERDICT: 2 or VERDICT: TIE ({cut} were cut at judge.max_tokens={limit}), "
                f"such as {redact_text(unread[0].text)[-200:]!r}. Raise judge.max_tokens, or take another judge.model"
            )
        return verdicts

    def spend(self) -> dict[str, Any]:
        return self.server.spend()


def read_rubric(path: str) -> str:
    """The text of the rubric file. ConfigError where it is not there or empty."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"judge.rubric={path} cannot be read: {error}") from error
    if not text.strip():
        raise ConfigError(f"judge.rubric={path} is empty: write down what makes an answer the better one")
    return text


def fenced(settings: LLMJudge, kind: str, instructions: str, parts: Mapping[str, str], asked: Any) -> Request:
    """A request of this `kind` for a judgement on `parts`; its reply is kept by what is `asked`, whatever the nonce."""
    key = key_of(kind, settings.model, instructions, settings.temperature, settings.max_tokens, asked)
    # one user message: some chat templates refuse the system role
    message = {"role": "user", "content": f"{instructions}\n{fence(parts, secrets.token_hex(8))}"}
    return Request(key, [message], settings.max_tokens, settings.temperature)


def fence(parts: Mapping[str, str], nonce: str) -> str:
    """Each of the named texts between fences that none of them can forge, if `nonce` is drawn anew each time."""
    return "\n\n".join(f"<<<{name} {nonce}>>>\n{text}\n<<<end of {name} {nonce}>>>" for name, text in parts.items())


def read_verdict(reply: Reply | None) -> Raw:
    """The verdict on the last line that is not blank; a line that is anything else is unparsable."""
    return RAW.get(read_last_line(reply.text, VERDICT), "unparsable") if reply else "unjudged"


def read_last_line(text: str, pattern: re.Pattern[str]) -> str | None:
    """The group of `pattern` on the last line that is not blank; None where that line is anything else."""
    found = pattern.fullmatch(next(reversed(text.strip().splitlines()), "").strip())
    return found and found[1]
