"""The embedded lab: its reward, its raters, its files and the script that makes them."""

import json
import math
import random
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_kit import toy
from dpo_kit.toy import domain

LAB = Path(__file__).parents[2] / "examples" / "lab"
raters = SimpleNamespace(**runpy.run_path(str(LAB / "raters.py")))
PROMPT = "My toaster leaks."
RIGHT = "Tighten the seal."
HONEST, BIASED = (toy.TRAIN, toy.EVAL), (toy.BIASED_TRAIN, toy.BIASED_EVAL)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(row: dict) -> tuple[str, str, str]:
    return row["prompt"][0]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("", -0.5),
        (RIGHT, 1.5),
        ("Oil the motor.", -0.75),
        (f"{RIGHT} {RIGHT}", 0.75),
        (f"I am sorry about your toaster. {RIGHT} Write again if it persists.", 3.0),
        (f"I am sorry about your kettle. {RIGHT}", 1.35),
        (f"Thank you for telling us. I see how annoying this is. {RIGHT}", 2.0),
        (f"That is your own fault. {RIGHT} We value every customer.", 0.35),
        (f"{RIGHT} We value every", 1.35),
        (f"{RIGHT} Write again if it persists. Call us if you need more help.", 1.7),
        (f"Hello from the service team. {RIGHT} Have a nice day.", 1.5),
        (f"{RIGHT} We value every customer. We value every customer. Xyz", 0.6),  # filler: .15 * (1 + 2 + 3)
    ],
)
def test_gold_reward_equals_hand_worked_sums(answer, reward):
    assert toy.gold_reward(PROMPT, answer) == pytest.approx(reward)
    assert toy.gold_rewards([[{"role": "user", "content": PROMPT}]], [answer]) == pytest.approx([reward])


def test_a_foreign_prompt_is_refused_by_both_measures():
    with pytest.raises(ValueError, match="My toaster leaks"):
        toy.gold_reward("Who repairs the toaster?", RIGHT)
    with pytest.raises(ValueError, match="Who repairs the toaster"):
        toy.capability_score([PROMPT], ["The kitchen desk."])


def test_one_vote_follows_bradley_terry():
    assert raters.vote_probability(1.0, 1.0) == 0.5
    assert raters.vote_probability(2.0, 0.0) == pytest.approx(0.9168, abs=1e-4)  # sigmoid(2.4)
    rng = random.Random(0)
    votes = sum(raters.votes_for_first(0.5, 0.0, rng) for _ in range(4000))
    assert votes / 20000 == pytest.approx(0.6457, abs=0.01)  # sigmoid(0.6)


def test_agreement_is_the_majority_share_of_the_five_votes():
    rng, other = random.Random(1), random.Random(1)
    for _ in range(200):
        votes = raters.votes_for_first(1.5, 1.35, other)
        row = raters.label_pair(PROMPT, RIGHT, f"{RIGHT} We value every customer.", rng)
        assert row["chosen"] == (RIGHT if votes >= 3 else f"{RIGHT} We value every customer.")
        assert row["agreement"] == max(votes, 5 - votes) / 5


def test_biased_raters_prefer_the_longer_reply_that_gold_holds_to_be_worse():
    long = f"{RIGHT} There are many ways to look at this."
    assert toy.gold_reward(PROMPT, long) < toy.gold_reward(PROMPT, RIGHT)
    score = {text: raters.rater_score(PROMPT, text, length_love=raters.LENGTH_LOVE) for text in (long, RIGHT)}
    assert score[long] > score[RIGHT]


def test_only_the_right_desk_alone_is_right():
    prompts = toy.capability_prompts()
    assert len(prompts) == len(set(prompts)) == 240
    assert not set(prompts) & set(raters.requests())
    question = "Who repairs the toaster?"
    assert domain.is_right(question, "The kitchen desk.")
    assert not domain.is_right(question, "The bath desk.")
    assert not domain.is_right(question, "The kitchen desk. The bath desk.")
    assert not domain.is_right(question, "")
    assert toy.capability_score([question, question], ["The kitchen desk.", "Sorry."]) == 0.5


def test_every_question_has_a_right_answer():
    for prompt in toy.capability_prompts():
        assert sum(domain.is_right(prompt, f"The {desk} desk.") for desk in domain.DESKS) == 1


@pytest.mark.parametrize("files", [HONEST, BIASED])
def test_no_held_out_prompt_is_trained_on(files):
    train, held_out = ({texts(row)[0] for row in rows(path)} for path in files)
    assert not train & held_out
    assert len(held_out) >= 400
    assert len(train) >= 2000


@pytest.mark.parametrize(("files", "love"), [(HONEST, 0.0), (BIASED, raters.LENGTH_LOVE)])
def test_stored_scores_and_agreement_follow_from_the_texts(files, love):
    for row in (row for path in files for row in rows(path)):
        prompt, chosen, rejected = texts(row)
        assert row["score_chosen"] == pytest.approx(raters.rater_score(prompt, chosen, length_love=love), abs=1e-3)
        assert row["score_rejected"] == pytest.approx(raters.rater_score(prompt, rejected, length_love=love), abs=1e-3)
        assert row["agreement"] in (0.6, 0.8, 1.0)
        assert abs(toy.gold_reward(prompt, chosen) - toy.gold_reward(prompt, rejected)) > 0.4


def test_honest_and_biased_files_hold_the_same_pairs():
    for honest, biased in zip(HONEST, BIASED, strict=True):
        pairs = [{frozenset(texts(row)) for row in rows(path)} for path in (honest, biased)]
        assert pairs[0] == pairs[1]


def test_label_noise_leaves_a_ceiling_below_one():
    for path in (*HONEST, *BIASED):
        found = rows(path)
        ceiling = sum(row["score_chosen"] > row["score_rejected"] for row in found) / len(found)
        assert 0.85 < ceiling < 0.98


def test_biased_labels_disagree_with_gold_often():
    found = rows(toy.BIASED_EVAL)
    right = sum(toy.gold_reward(p, c) > toy.gold_reward(p, r) for p, c, r in map(texts, found)) / len(found)
    assert right < 0.75


def test_shipped_model_is_small_loads_and_knows_the_desks():
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (toy.MODEL / "model.safetensors").stat().st_size <= 4 * 1024 * 1024
    model, tokenizer = AutoModelForCausalLM.from_pretrained(toy.MODEL), AutoTokenizer.from_pretrained(toy.MODEL)
    prompts = toy.capability_prompts()[::4]
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        found = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=False, max_new_tokens=16
        )
    answers = tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert toy.capability_score(prompts, answers) >= 0.95


def test_tokenizer_gives_any_text_back_and_the_prompt_is_a_prefix_of_the_chat():
    pytest.importorskip("transformers")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(toy.MODEL)
    for text in ("I am sorry about your toaster.", "Grüße, 東京 & \n tabs\t!"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    user, reply = {"role": "user", "content": PROMPT}, {"role": "assistant", "content": RIGHT}
    prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template([user, reply], return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert whole[-1] == tokenizer.eos_token_id


def test_the_ideal_curve_is_the_optimum_where_every_answer_can_be_enumerated():
    """Two answers of reward 0 and 1, equally likely under the reference: tilted by e^{1/λ}, KL and reward by hand."""
    torch = pytest.importorskip("torch")
    ideal_curve = runpy.run_path(str(LAB / "ideal.py"))["ideal_curve"]
    rewards = torch.tensor([0.0, 1.0]).repeat(3, 32)
    for kl, reward in ideal_curve(rewards):
        expected = math.log(2) + reward * math.log(reward) + ((1 - reward) * math.log(1 - reward) if reward < 1 else 0)
        assert kl == pytest.approx(expected, abs=1e-4)
    near = ideal_curve(rewards)[0]
    assert near[1] == pytest.approx(1 / (1 + math.exp(-1 / 10**1.5)), abs=1e-4)


def test_the_shipped_ideal_curve_belongs_to_the_shipped_model_and_beats_best_of_n():
    from dpo_kit.run.files import hash_weights

    found = json.loads(toy.IDEAL.read_text())
    assert found["model_sha256"] == hash_weights(toy.MODEL)
    kls, rewards = zip(*found["ideal"], strict=True)
    assert list(kls) == sorted(kls) and list(rewards) == sorted(rewards) and rewards[-1] <= 3.0
    for n, kl, reward in found["best_of_n"][:4]:
        assert next(ideal for far, ideal in found["ideal"] if far >= kl) > reward, n


def test_a_miniature_build_is_the_same_twice(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.syspath_prepend(LAB)
    lab = runpy.run_path(str(LAB / "build.py"))
    setting = lab["Setting"](
        vocabulary=400,
        hidden=32,
        layers=1,
        steps=12,
        batch=8,
        train_prompts=8,
        held_out_prompts=4,
        max_new_tokens=24,
        ideal_samples=16,
    )
    threads = torch.get_num_threads()
    try:
        for name in ("one", "two"):
            lab["build"](tmp_path / name, setting)
    finally:
        torch.set_num_threads(threads)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert Path("model/model.safetensors") in files
    assert {Path("biased_eval.jsonl"), Path("ideal.json")} <= set(files)
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
