"""Train, read what came of it, and go on with the policy in plain transformers.

    python examples/quickstart.py

Expect, with a run directory under outputs/ and an answer of the tuned policy:

    held-out accuracy   0.887 ± 0.045
    margin, nats        3.96 ± 0.90
    KL reverse, nats    2.97 ± 0.60
    gold reward         2.18 ± 0.20
"""

from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_kit import compose, train

QUESTION = "My iron flickers."
SHOWN = {
    "held-out accuracy": "probe/accuracy",
    "margin, nats": "probe/margin_nats",
    "KL reverse, nats": "probe/kl_reverse_rb_nats",
    "gold reward": "gold/reward",  # of fresh answers; the embedded data alone know it
}


def main():
    result = train(compose(["method=dpo", "beta=0.1", "tracking=none"]))  # what stands after python -m dpo_kit
    for name, key in SHOWN.items():
        print(f"{name:<19} {result.final[key]:.3f}")
    print(f"\n{QUESTION}\n{answer(f'{result.run_dir}/model', QUESTION)}")


def answer(folder, question):
    tokenizer, policy = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = policy.generate(**prompt, max_new_tokens=64, do_sample=False)
    return tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
