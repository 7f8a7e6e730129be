"""Builds the embedded lab from nothing: `python examples/lab/build.py [out=DIR] [only=ideal]` (some minutes, seeded).

1. a byte-level BPE tokenizer with a chat template, trained on the domain's texts;
2. a tiny Llama (under 4 MB of weights), trained from scratch on average replies and on the skill outside the reward;
3. pairs: two replies to each prompt, sampled *from that model* and labelled by five raters, honest and biased;
4. the ideal curve of gold reward over KL, from many more samples (`only=ideal` makes this alone).

The seed and the number of threads are fixed, so the same versions on the same kind of processor give the same files.
Each file is replaced atomically once it is whole.
"""

import json
import logging
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import raters
import torch
from ideal import ROUNDS, ideal_curve
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo_kit.run.files import hash_weights
from dpo_kit.sweep.choice.best_of import best_of_n
from dpo_kit.toy import MODEL, domain

logger = logging.getLogger(__name__)

PAD, USER, ASSISTANT, SYSTEM, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
BEST_OF = (1, 2, 4, 8, 16)
LEAST_GAP = 0.45
"""Points of gold reward by which the two replies of a pair differ at least."""
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Setting:
    """Sizes of a build. The defaults make the shipped files; tests make a miniature."""

    seed: int = 0
    threads: int = 1
    vocabulary: int = 640
    hidden: int = 96
    layers: int = 3
    steps: int = 700
    batch: int = 64
    learning_rate: float = 4e-3
    question_share: float = 0.2
    train_prompts: int = 2400
    held_out_prompts: int = 480
    train_pairs_per_prompt: int = 1
    held_out_pairs_per_prompt: int = 2
    max_new_tokens: int = 64
    ideal_samples: int = ROUNDS


def build(out: Path, setting: Setting) -> None:
    """Writes `model/`, `train.jsonl`, `eval.jsonl`, `biased_train.jsonl` and `biased_eval.jsonl` under `out`."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(setting.seed)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        tokenizer = build_tokenizer(setting)
        model = train_model(tokenizer, setting)
        save_model(model, tokenizer, Path(scratch) / "model", setting)
        write_pairs(model, tokenizer, Path(scratch), setting)
        write_ideal(model, tokenizer, Path(scratch), setting)
        _replace(Path(scratch), out)


def build_tokenizer(setting: Setting) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: the lab's words are single tokens, and any other text still encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (PAD, USER, ASSISTANT, SYSTEM, END)]
    trainer = trainers.BpeTrainer(
        vocab_size=setting.vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng, requests = random.Random(setting.seed), raters.requests()
    texts = [text for _ in range(4000) for text in _draw_turns(requests, rng, setting.question_share)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def _draw_turns(requests: list[str], rng: random.Random, question_share: float) -> tuple[str, str]:
    """(prompt, answer): sometimes a question of the skill and its right answer, else a request and an average reply."""
    if rng.random() < question_share:
        item = rng.choice(domain.ITEMS)
        return rng.choice(domain.QUESTIONS).format(item=item), domain.desk_answer(item)
    prompt = rng.choice(requests)
    return prompt, raters.draw_reply(prompt, rng)


def train_model(tokenizer: PreTrainedTokenizerFast, setting: Setting) -> LlamaForCausalLM:
    """Trains a Llama from scratch on turns drawn without end; the loss counts the answer's tokens and its end."""
    model = LlamaForCausalLM(_model_config(tokenizer, setting))
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.learning_rate, total_steps=setting.steps, pct_start=0.05, anneal_strategy="cos"
    )
    for step, batch in zip(range(setting.steps), _batches(tokenizer, setting), strict=False):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == setting.steps - 1:
            logger.info("step %d of %d: loss %.3f nats a token", step, setting.steps, loss.item())
    return model.eval()


def _model_config(tokenizer: PreTrainedTokenizerFast, setting: Setting) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=setting.hidden,
        intermediate_size=3 * setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batches(tokenizer: PreTrainedTokenizerFast, setting: Setting) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of right-padded turns: input_ids, attention_mask, labels, each (batch, longest)."""
    rng = random.Random(setting.seed + 1)
    requests = raters.requests()
    while True:
        turns = [_draw_turns(requests, rng, setting.question_share) for _ in range(setting.batch)]
        heads = tokenizer([f"{USER}{prompt}{END}{ASSISTANT}" for prompt, _ in turns]).input_ids
        tails = tokenizer([answer + END for _, answer in turns]).input_ids
        longest = max(len(head) + len(tail) for head, tail in zip(heads, tails, strict=True))
        yield {
            "input_ids": _pad([h + t for h, t in zip(heads, tails, strict=True)], tokenizer.pad_token_id, longest),
            "attention_mask": _pad([[1] * (len(h) + len(t)) for h, t in zip(heads, tails, strict=True)], 0, longest),
            "labels": _pad([[-100] * len(h) + t for h, t in zip(heads, tails, strict=True)], -100, longest),
        }


def _pad(rows: list[list[int]], value: int, length: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path, setting: Setting) -> None:
    """Saves weights (safetensors), config, tokenizer, chat template and a plain sampling configuration under `path`."""
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=setting.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def write_pairs(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, setting: Setting) -> None:
    """Samples pairs for the train and the held-out prompts and writes them twice: with honest and biased labels."""
    train, held_out = raters.split_requests(setting.held_out_prompts, seed=setting.seed)
    plans = {
        "train": train[: setting.train_prompts] * setting.train_pairs_per_prompt,
        "eval": held_out * setting.held_out_pairs_per_prompt,
    }
    for split, prompts in plans.items():
        pairs = sample_pairs(model, tokenizer, prompts, setting.max_new_tokens, setting.seed)
        _write_labelled(out / f"{split}.jsonl", pairs, random.Random(f"{setting.seed} {split}"), 0.0)
        rng = random.Random(f"{setting.seed} biased {split}")
        _write_labelled(out / f"biased_{split}.jsonl", pairs, rng, raters.LENGTH_LOVE)


def sample_pairs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new_tokens: int, seed: int
) -> list[tuple[str, str, str]]:
    """(prompt, reply, reply) per prompt: the first complete one of four samples, and the next LEAST_GAP apart from it.

    A pair between which the gold reward is nearly indifferent has no right label; it would blur the ceiling and teach
    nothing. Prompts without such a pair among four samples are left out.
    """
    replies = sample_replies(model, tokenizer, [prompt for prompt in prompts for _ in range(4)], max_new_tokens, seed)
    pairs = []
    for index, prompt in enumerate(prompts):
        complete = [reply for reply in replies[4 * index : 4 * index + 4] if reply is not None]
        other = next((r for r in complete[1:] if _gap(prompt, complete[0], r) > LEAST_GAP), None)
        if other is not None:
            pairs.append((prompt, complete[0], other))
    return pairs


def _gap(prompt: str, first: str, second: str) -> float:
    return abs(domain.gold_reward(prompt, first) - domain.gold_reward(prompt, second))


@torch.no_grad()
def sample_replies(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str], max_new_tokens: int, seed: int
) -> list[str | None]:
    """One reply per prompt at temperature 1, in order; None where the limit cut it. Seeds torch's global generator."""
    torch.manual_seed(seed)
    replies: list[str | None] = []
    for start in range(0, len(prompts), 480):
        texts = [f"{USER}{prompt}{END}{ASSISTANT}" for prompt in prompts[start : start + 480]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        rows = model.generate(**batch, max_new_tokens=max_new_tokens)[:, batch.input_ids.shape[1] :]  # type: ignore[misc]
        for row in rows.tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else None
            replies.append(None if end is None else str(tokenizer.decode(row[:end])))
    return replies


def _write_labelled(path: Path, pairs: list[tuple[str, str, str]], rng: random.Random, length_love: float) -> None:
    lines = []
    for prompt, first, second in pairs:
        row = raters.label_pair(prompt, first, second, rng, length_love=length_love)
        row["chosen"] = [{"role": "assistant", "content": row["chosen"]}]
        row["rejected"] = [{"role": "assistant", "content": row["rejected"]}]
        lines.append(json.dumps({"prompt": [{"role": "user", "content": prompt}], **row}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_ideal(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, setting: Setting) -> None:
    """Writes `ideal.json`: what is possible on the held-out prompts at each KL, and which weights it holds for."""
    _, prompts = raters.split_requests(setting.held_out_prompts, seed=setting.seed)
    asked = [prompt for prompt in prompts for _ in range(setting.ideal_samples)]
    replies = sample_replies(model, tokenizer, asked, setting.max_new_tokens, setting.seed)
    rewards = [domain.gold_reward(prompt, reply or "") for prompt, reply in zip(asked, replies, strict=True)]
    table = torch.tensor(rewards).view(len(prompts), setting.ideal_samples)
    best_of = [(point.n, point.kl, point.value) for point in best_of_n(table.tolist()) if point.n in BEST_OF]
    found: dict[str, object] = {"ideal": ideal_curve(table), "best_of_n": best_of}
    found["model_sha256"] = hash_weights(out / "model")
    (out / "ideal.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _replace(scratch: Path, out: Path) -> None:
    for source in sorted(path for path in scratch.rglob("*") if path.is_file()):
        target = out / source.relative_to(scratch)
        target.parent.mkdir(parents=True, exist_ok=True)
        source.chmod(0o644)
        source.replace(target)


def main(arguments: list[str]) -> None:
    """`python examples/lab/build.py [out=DIR] [only=ideal]`; without `out` the files of dpo_kit/toy are replaced."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = dict(argument.split("=", 1) for argument in arguments)
    out = Path(options.get("out", MODEL.parent))
    if options.get("only") == "ideal":
        model = LlamaForCausalLM.from_pretrained(out / "model")
        write_ideal(model, PreTrainedTokenizerFast.from_pretrained(out / "model"), out, Setting())
    else:
        build(out, Setting())


if __name__ == "__main__":
    main(sys.argv[1:])
