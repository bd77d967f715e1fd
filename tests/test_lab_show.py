"""What is shown is what was computed: segments, pushes, and the numbers in the plots."""

import math

import pytest
import torch

from cotkit import tokens
from cotkit.lab._show import microscope, plot, plot_arms, plot_scores, show_segments
from cotkit.losses.sft import nll

ROW = {"prompt": "2+3?", "completion": "<think>\n2+3=5\n5*2=10\n</think>\n10"}


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    byte = Tokenizer(models.BPE())
    byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte.train_from_iterator(
        ["2+3"],
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>", "<eos>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=byte, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
        )
    )


@pytest.fixture(autouse=True)
def close_figures():
    import matplotlib as mpl

    mpl.use("agg")
    yield
    import matplotlib.pyplot as plt

    plt.close("all")


def test_segments_are_those_of_encode(tokenizer):
    shown = show_segments(ROW, tokenizer)
    text = shown.table.groupby("segment", sort=False).token.apply("".join)
    assert text["prompt"] == "2+3?"
    assert text["thought"].replace("\n", "") == "2+3=55*2=10"
    assert text["answer"] == "10"
    assert "".join(shown.table.token) == ROW["prompt"] + ROW["completion"] + "<eos>"
    first = "".join(shown.table.token[shown.table.step == 0])
    assert first.strip() == "2+3=5"
    assert not shown.table.target[shown.table.segment == "prompt"].any()
    assert shown.table.target[shown.table.segment == "answer"].all()


def test_segments_as_html(tokenizer):
    html = show_segments(ROW, tokenizer)._repr_html_()
    for name in ("prompt", "thought 1", "thought 2", "answer", "special"):
        assert f">{name}</th>" in html
    assert "&lt;" in html  # text is escaped
    assert "<think>" not in html
    assert "does not follow" not in html
    broken = show_segments({"prompt": "2+3?", "completion": "no idea"}, tokenizer)
    assert "does not follow" in broken.html
    assert repr(broken).startswith("<")


def weighted(logps, batch, _denom):
    """Pushes the first row up by 2 per token and the second down by its column."""
    sign = torch.tensor([-2.0, 1.0])[:, None] * batch["size"][:, None]
    return (sign * logps * batch["mask"]).sum()


def test_push_is_minus_the_gradient(model, tokenizer):
    rows = [ROW | {"size": 1.0}, ROW | {"size": 3.0, "completion": "<think>\n2*3=6\n</think>\n6"}]
    seen = microscope({"up and down": weighted}, model, tokenizer, rows, columns=("size",))
    up, down = seen.table[seen.table.row == 0], seen.table[seen.table.row == 1]
    assert (up.push == 2.0).all()  # -(-2 * 1)
    assert (down.push == -3.0).all()  # -(1 * 3)
    assert (seen.table.logp < 0).all()
    assert "up and down" in seen.html
    assert "largest push 3" in seen.html
    assert "rgba(213,94,0" in seen.html
    assert "row 1" in seen.html


def test_a_line_for_every_loss_and_row(model, tokenizer):
    from cotkit.losses.sft import nll

    def sft(logps, batch, denom):
        return nll(logps, batch["mask"], denom=denom)

    def answer_only(logps, batch, denom):
        return nll(logps, batch["mask"] & (batch["segments"] == 3), denom=denom)

    model.train()
    seen = microscope({"sft": sft, "answer": answer_only}, model, tokenizer, ROW)
    assert model.training
    table = seen.table
    n = int((table.loss == "sft").sum())
    # nll is a mean over n tokens: each is pushed up by 1 / n
    assert table[table.loss == "sft"].push.tolist() == pytest.approx([1 / n] * n, rel=1e-6)
    answer = table[table.loss == "answer"]
    assert set(answer[answer.push > 0].segment) == {"answer"}
    assert (answer[answer.segment == "thought"].push == 0).all()
    assert seen.html.count("<tr>") == 2
    single = microscope(sft, model, tokenizer, ROW)
    assert set(single.table.loss) == {"sft"}


def test_a_loss_that_reads_nothing_pushes_nothing(model, tokenizer):
    def constant(_logps, _batch, _denom):
        return torch.ones((), requires_grad=True) * 2

    seen = microscope(constant, model, tokenizer, ROW)
    assert (seen.table.push == 0).all()
    assert "rgba(213,94,0,0.00)" in seen.html


def test_plot_draws_seeds_and_their_mean():
    ax = plot(
        {"SFT": [[1.0, 3.0], [2.0, 5.0]], "AFT": [0.0, 7.0]},
        x="tokens (thousand)",
        y="loss (nats)",
        title="AFT falls",
        at=[10, 20],
        baseline="AFT",
    )
    thick = [line for line in ax.lines if line.get_linewidth() == 2]
    assert [line.get_ydata().tolist() for line in thick] == [[1.5, 4.0], [0.0, 7.0]]
    assert thick[0].get_xdata().tolist() == [10, 20]
    assert len(ax.lines) == 4  # two seeds, two means
    assert thick[1].get_color() == "#8a8a8a"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("tokens (thousand)", "loss (nats)")
    assert "AFT falls" in (ax.get_title(), ax.get_title(loc="left"))


def test_plot_arms_draws_points_and_interval():
    ax = plot_arms(
        {"SFT": [0.5, 0.6, 0.7], "AFT": [[0.6, 0.8], [0.8, 1.0]]}, y="accuracy (fraction)", title="Up"
    )
    points = [c.get_offsets()[:, 1].tolist() for c in ax.collections if hasattr(c, "get_offsets")]
    assert [0.5, 0.6, 0.7] in points
    assert [0.6, 0.8] in points
    assert [0.8, 1.0] in points
    bars = [c for c in ax.containers if c.has_yerr]
    low, high = bars[0].lines[2][0].get_segments()[0][:, 1]
    # mean .6, s .1, t_2 = 4.302653
    assert (high - low) / 2 == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert (high + low) / 2 == pytest.approx(0.6, abs=1e-12)


def test_plot_scores_counts_right_and_wrong():
    scores, right = [-0.1, -0.2, -0.9, -0.8, -0.7], [1, 1, 0, 0, 0]
    axes = plot_scores({"before": (scores, right), "after": (scores, right)}, title="Wrong chains fall")
    assert len(axes) == 2
    labels = [t.get_text() for t in axes[0].get_legend().get_texts()]
    assert sorted(labels) == ["right (2)", "wrong (3)"]
    assert axes[0].get_xlabel() == "mean log-probability (nats per token)"
    assert axes[0].figure.get_suptitle() == "Wrong chains fall"


@pytest.mark.errors
def test_refusals(model, tokenizer):
    with pytest.raises(TypeError, match="expected one row"):
        show_segments([ROW], tokenizer)
    with pytest.raises(ValueError, match="got 0 losses, 1 rows"):
        microscope({}, model, tokenizer, ROW)
    with pytest.raises(ValueError, match="expected column 'rank'"):
        microscope(weighted, model, tokenizer, ROW, columns=("rank",))
    words = {"x": "step", "y": "loss (nats)", "title": "Down"}
    with pytest.raises(ValueError, match="at least one arm"):
        plot({}, **words)
    with pytest.raises(ValueError, match="expected title as text"):
        plot({"a": [1.0]}, x="step", y="loss (nats)", title=" ")
    with pytest.raises(ValueError, match="expected baseline to be one of 'a'"):
        plot({"a": [1.0]}, **words, baseline="b")
    with pytest.raises(ValueError, match=r"as \[seeds, 3 points\]"):
        plot({"a": [1.0, 2.0]}, **words, at=[0, 1, 2])
    with pytest.raises(ValueError, match="expected numbers for 'a'"):
        plot_arms({"a": []}, y="accuracy", title="None")
    with pytest.raises(ValueError, match="expected scores, right"):
        plot_scores({"a": ([1.0], [True, False])}, title="No")


def test_microscope_reads_a_prepared_batch_and_shows_the_labels(model, tokenizer):
    def prepare(batch, step):
        assert step == 0
        ids, _ = tokens.corrupt(batch["input_ids"], batch["labels"] != -100, 1.0, mask_id=3)
        return {**batch, "input_ids": ids}

    def loss(logps, batch, denom):
        return nll(logps, batch["mask"], denom=denom)

    plain = microscope(loss, model, tokenizer, ROW).table
    masked = microscope(loss, model, tokenizer, ROW, prepare=prepare).table
    assert list(plain.token) == list(masked.token)
    assert plain.logp[0] == pytest.approx(masked.logp[0], abs=1e-5)  # it is read from the prompt alone
    assert (plain.logp[1:] - masked.logp[1:]).abs().max() > 1e-3
