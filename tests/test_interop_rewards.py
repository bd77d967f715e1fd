"""A cotkit reward goes to GRPOTrainer as it is, an answer that cannot be scored (None) included."""

import math

import trl_worker as worker  # first: it keeps the hub's client off the network

from cotkit.rewards.answer import accuracy

ANSWERS = [
    f"\\boxed{{{n}}}" for n in range(9)
]  # a token is a whole answer, so that a random model is right at times


def test_two_steps_of_grpo(tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seen = []

    def spy(prompts, completions, **columns):
        seen.append(accuracy()(prompts, completions, **columns))
        return seen[-1]

    gold = ["3", "5", None, "7"]  # the third has no right answer: its completions cannot be scored
    rows = [{"prompt": " ".join(ANSWERS[i : i + 3]), "answer": gold[i]} for i in range(4)]
    tokenizer = worker.tokenizer(ANSWERS)
    network = worker.model(vocab_size=len(tokenizer))
    start = {name: value.detach().clone() for name, value in network.named_parameters()}
    args = GRPOConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        per_device_train_batch_size=32,
        num_generations=8,
        max_completion_length=1,
        max_steps=2,
        learning_rate=0.01,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        seed=1,
    )
    trainer = GRPOTrainer(
        model=network,
        reward_funcs=[spy, accuracy()],
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert len(seen) == 2
    for scores in seen:
        assert len(scores) == 32
        assert scores.count(None) == 8  # the group without a gold answer, and only that
        assert set(scores) == {None, 0.0, 1.0}
    logged = set().union(*trainer.state.log_history)
    assert {"rewards/accuracy/mean", "rewards/spy/mean"} <= logged  # a partial keeps a readable name
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)
    moved = [name for name, value in network.named_parameters() if not value.equal(start[name])]
    assert moved
    assert all(value.isfinite().all() for value in network.parameters())
