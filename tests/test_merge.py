"""Pins for merge: soups, task vectors, masks, stock, and the stream over files."""

import json
import math
import struct
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import tensor

from cotkit import merge
from cotkit.merge import (
    _files,
    _masks,
    _states,
    apply,
    average,
    breadcrumbs,
    checkpoint,
    cosines,
    delta,
    greedy_soup,
    lazy,
    lines,
    lines_alpha,
    model_stock,
    reset,
    save,
    select_experts,
    stock_ratio,
)

BLOCKS = r"layers\.(\d+)\."


def close(state, expected, atol=1e-12):
    assert list(state) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(state[name], x, rtol=0, atol=atol)


def f(*values, dtype=torch.float64):
    return tensor(values[0] if isinstance(values[0], list) else list(values), dtype=dtype)


def draw(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# The models that the authors' code and mergekit were run on: a Llama of two layers, 4 wide


def shapes():
    found = {"model.embed_tokens.weight": (6, 4)}
    for i in range(2):
        at = f"model.layers.{i}."
        found |= {f"{at}self_attn.{m}_proj.weight": (4, 4) for m in "qkvo"}
        found |= {f"{at}mlp.{m}_proj.weight": (5, 4) for m in ("gate", "up")}
        found |= {f"{at}mlp.down_proj.weight": (4, 5)}
        found |= {f"{at}{m}_layernorm.weight": (4,) for m in ("input", "post_attention")}
    return found | {"model.norm.weight": (4,), "lm_head.weight": (6, 4)}


def waves(k):
    """The base (k = 0), or the k-th model tuned from it, float32."""
    out = {}
    for j, (name, shape) in enumerate(shapes().items()):
        i = torch.arange(math.prod(shape), dtype=torch.float64)
        x = torch.sin(0.7 * i + j)
        if k:
            x = x + 0.1 * torch.sin(1.3 * i * k + j + k) + 0.05 * torch.cos(0.9 * i + 2 * j)
        out[name] = x.reshape(shape).float()
    return out


MODELS = [waves(k) for k in range(6)]
BASE, TUNED = MODELS[0], MODELS[1:4]
Q, DOWN = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def starts(state, name, numbers, atol=2e-7):
    assert state[name].flatten()[: len(numbers)].tolist() == pytest.approx(numbers, abs=atol)


def test_lines_equals_the_authors_code():
    """Numbers of wang-kee/LiNeS, src/eval/eval.py LiNeS_scaling and src/eval/aggregation.py (two norms)."""
    taus = [delta(state, BASE) for state in TUNED]
    scaled = lines(taus[0], BLOCKS, 2, alpha=0.2, beta=0.7)
    starts(scaled, "model.embed_tokens.weight", [0.02682942, 0.0211302, -0.01112243, -0.02868978], 1e-8)
    starts(scaled, Q, [0.01402448, -0.01286449, -0.0277835, -0.00760142], 1e-8)
    starts(scaled, DOWN, [-0.04898572, -0.04311018, 0.02868231, 0.03530018], 1e-8)
    summed = {name: sum(tau[name] for tau in taus) for name in BASE}
    masked = {name: x * (x.abs() > 0.2) for name, x in summed.items()}
    assert lines_alpha(taus, masked) == pytest.approx(0.7283912867518932, rel=1e-6)


def test_breadcrumbs_by_row_equals_the_authors_code():
    """Numbers of rezazzr/breadcrumbs, src/task_vectors.py TaskVectorMiddleKeep (keep .5, remove .25)."""
    got = breadcrumbs(BASE, TUNED, alpha=0.4, beta=0.25, gamma=0.75, per="row")
    starts(got, "model.layers.1.self_attn.v_proj.weight", [
        -0.4767876, 0.1430364, 0.7698189, 0.9622152, 0.7458732, 0.1940028, -0.4438817, -0.9230551,
        -0.9588544, -0.5223086, 0.1567991, 0.7920467, 0.9856978, 0.6962103, 0.2177214, -0.5054446,
    ])  # fmt: skip
    got = breadcrumbs(BASE, TUNED, alpha=0.4, beta=0.2, gamma=0.8, per="row")  # keep .6, remove .2 of 5
    starts(got, "model.layers.0.mlp.down_proj.weight", [
        0.6802696, 1.0132291, 0.8746046, 0.2369907, -0.2849113, -0.8801101, -0.9658082, -0.6175263,
    ])  # fmt: skip


def test_soups_equal_the_authors_code():
    """Numbers of mlfoundations/model-soups, main.py, its uniform and greedy blocks run on five models."""
    goal = BASE["lm_head.weight"] + 0.05

    def score(state):
        return -float((state["lm_head.weight"] - goal).abs().sum())

    uniform = average(MODELS[1:])
    starts(uniform, Q, [0.8017691, 0.9319915, 0.6300451, 0.0408835, -0.5053542, -0.9321719])
    soup, chosen = greedy_soup(MODELS[1:], score, strict=True)
    assert chosen == [3, 1, 4]
    starts(soup, Q, [0.7840897, 0.8965348, 0.6823723, 0.0530289, -0.5093917, -0.927833])


MERGEKIT = {  # mergekit 0.1.5 run_merge, dtype float32, on the three models in safetensors
    "linear": {
        Q: [0.843896, 0.9168081, 0.6513721, -0.0256607, -0.4983539, -0.9365968, -0.8751521, -0.3848759],
        DOWN: [-0.3144331, -0.8027795, -1.0487231, -0.6794737, -0.0884322, 0.5823514, 1.0467128, 0.9054097],
        "model.norm.weight": [0.2713975, 0.7406772, 0.9939508, 0.6834635],
    },
    "model_stock": {
        Q: [0.8352957, 0.9683816, 0.6393584, 0.0160762, -0.5487359, -0.9592739, -0.8682972, -0.3934169],
        DOWN: [-0.2914038, -0.839361, -0.9965708, -0.6884584, -0.0622615, 0.6039721, 0.9862215, 0.9073718],
        "model.norm.weight": [0.1973341, 0.764653, 0.978057, 0.7452803],
    },
    "breadcrumbs": {
        Q: [0.8309249, 0.921266, 0.6754632, 0.0020954, -0.4766836, -0.9260589, -0.8439991, -0.4222863],
        DOWN: [-0.3096747, -0.8450329, -0.9926594, -0.6813138, -0.0495356, 0.608863, 1.0276432, 0.8637569],
        "model.norm.weight": [0.2580642, 0.7865706, 0.9497214, 0.6803818],
    },
}
SUMS = {  # of all tensors, names sorted
    "linear": [
        0.419714, 2.502018, 0.970797, 1.707997, -1.458716, 0.219845, -1.648664, -1.600562, -0.381525,
        -0.011695, -1.675452, -2.066191, -1.286265, 1.898363, 0.621731, 0.763018, 0.910175, 1.09863,
        -0.847275, 1.98596, 2.689489,
    ],
    "model_stock": [
        0.482916, 2.471524, 1.037654, 1.696262, -1.491291, 0.184844, -1.713044, -1.549212, -0.357551,
        0.026849, -1.69584, -2.061318, -1.209288, 1.877444, 0.633584, 0.655431, 0.915326, 1.061751,
        -0.828252, 1.86815, 2.685324,
    ],
    "breadcrumbs": [
        0.340975, 2.618963, 0.997673, 1.625211, -1.67145, 0.123303, -1.640266, -1.384824, -0.478558,
        0.053557, -1.688251, -2.097302, -1.283535, 1.869045, 0.695193, 0.804094, 0.871634, 0.905615,
        -0.817515, 1.956932, 2.674738,
    ],
}  # fmt: skip


@pytest.mark.parametrize("method", MERGEKIT)
def test_merges_equal_mergekit(method):
    got = {
        "linear": lambda: average(TUNED, [1.0, 2.0, 0.5]),
        "model_stock": lambda: model_stock(BASE, TUNED),
        "breadcrumbs": lambda: breadcrumbs(BASE, TUNED, alpha=0.4, beta=0.4, gamma=0.9),
    }[method]()
    for name, numbers in MERGEKIT[method].items():
        starts(got, name, numbers)
    assert [float(got[n].double().sum()) for n in sorted(got)] == pytest.approx(SUMS[method], abs=3e-6)


# By hand


def test_task_vectors_by_hand():
    base, a = {"w": f(1.0, -2.0), "v": f([[3.0]])}, {"w": f(1.5, 2.0), "v": f([[7.0]])}
    b = {"w": f(0.0, -5.0), "v": f([[2.5]])}
    tau, rho = delta(a, base), delta(b, base)
    close(tau, {"w": f(0.5, 4.0), "v": f([[4.0]])})
    close(apply(base, [tau, rho], scale=0.25), {"w": f(0.875, -1.75), "v": f([[3.875]])})  # -.5, 1; 3.5
    close(apply(base, [tau], scale=-1.0), {"w": f(0.5, -6.0), "v": f([[-1.0]])})
    for whole in (apply(base, []), apply(base, [tau], scale=0.0)):
        assert all(torch.equal(whole[n], base[n]) and whole[n] is not base[n] for n in base)
    close(apply(base, [tau], scale=1.0), a)
    close(apply(base, [tau], scale=0.3), average([base, a], [0.7, 0.3]))


def test_average_by_hand_and_its_exact_cases():
    a, b, c = {"w": f(1.0, 7.0)}, {"w": f(2.0, -1.0)}, {"w": f(6.0, 3.0)}
    close(average([a, b, c]), {"w": f(3.0, 3.0)})
    close(average([a, b, c], [2, 1, 5]), {"w": f(34 / 8, 28 / 8)})
    close(average([c, b, a], [5, 1, 2]), {"w": f(34 / 8, 28 / 8)})
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = {"w": draw(1, 40, dtype=dtype)}
        y = {"w": draw(2, 40, dtype=dtype)}
        assert torch.equal(average([x])["w"], x["w"])
        assert torch.equal(average([x, x, x])["w"], x["w"])
        assert torch.equal(average([x, y], [0, 3])["w"], y["w"])
        assert torch.equal(average([x, y, y], [1, 0, 0])["w"], x["w"])


def test_disperse_then_merge():
    rows = list(range(11))
    parts = [rows[i::4] for i in range(4)]
    assert sorted(row for part in parts for row in part) == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    # Least squares on four parts, each with a cue of its own that goes with the label there only
    x, y = draw(0, 400, 6), draw(1, 400)
    y = x[:, 0] - 2 * x[:, 1] + y
    shards = []
    for i in range(4):
        part = x[i::4].clone()
        part[:, 2 + i] += y[i::4]
        shards.append((part, y[i::4]))

    def fit(inputs, target):
        return {"w": torch.linalg.lstsq(inputs, target[:, None]).solution[:, 0]}

    merged = average([fit(*shard) for shard in shards])["w"]
    alone = fit(*shards[0])["w"]
    assert (
        merged[2:].abs().max() < 0.5 * alone[2:].abs().max()
    )  # no cue counts as much as where it was learnt
    close(average([fit(x, y)] * 4), fit(x, y))


def test_greedy_soup_step_by_step():
    models = [{"w": f(x)} for x in (0.0, 4.0, 9.0, 1.0)]
    asked = []

    def score(state):
        asked.append(float(state["w"]))
        return -abs(asked[-1] - 3.0)

    # alone: -3 -1 -6 -2, so 4, 1, 0, 9; (4+1)/2 = 2.5 in; (4+1+0)/3 out; (4+1+9)/3 = 4.67 out
    soup, chosen = greedy_soup(models, score)
    assert chosen == [1, 3]
    assert soup["w"].item() == 2.5
    assert asked[4:] == pytest.approx([2.5, 5 / 3, 14 / 3])
    assert score(soup) >= max(score(m) for m in models)

    # Equal scores: kept, unless strict; the earlier model goes first
    assert greedy_soup(models, lambda _: 0.5)[1] == [0, 1, 2, 3]
    assert greedy_soup(models, lambda _: 0.5, strict=True)[1] == [0]
    assert greedy_soup(models[:1], score)[1] == [0]


def test_cosines_by_hand():
    base = {"w": f(1.0, 1.0), "v": f(0.0), "n": tensor([3])}
    a = {"w": f(1.0, 3.0), "v": f(2.0), "n": tensor([3])}  # deltas (0, 2), 2
    b = {"w": f(4.0, 5.0), "v": f(-1.0), "n": tensor([4])}  # (3, 4), -1
    c = {"w": f(1.0, 1.0), "v": f(5.0), "n": tensor([3])}  # (0, 0), 5
    each = cosines(base, [a, b, c])
    assert list(each) == ["w", "v"]
    close(each, {
        "w": f([[1.0, 0.8, 0.0], [0.8, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        "v": f([[1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [1.0, -1.0, 1.0]]),
    })  # fmt: skip
    whole = cosines(base, [a, b], group=lambda _: "all")["all"]  # (8 - 2) / sqrt(8 * 26)
    assert whole[0, 1].item() == whole[1, 0].item() == pytest.approx(6 / math.sqrt(208), abs=1e-12)
    assert list(cosines(base, [a], group=lambda name: None if name == "w" else 7)) == [7]


@pytest.mark.parametrize(
    ("cosine", "n", "t"),
    [
        (1, 2, 1),
        (0, 5, 0),
        (0.5, 2, 2 / 3),
        (0.5, 3, 0.75),
        (-0.25, 2, -2 / 3),
        (-0.25, 3, -1.5),
        (-0.5, 3, 0),
    ],
)
def test_stock_ratio(cosine, n, t):
    assert stock_ratio(cosine, n) == pytest.approx(t, abs=1e-12)


def test_model_stock_by_hand():
    base, a, b = {"w": f(1.0, 1.0)}, {"w": f(1.0, 3.0)}, {"w": f(4.0, 5.0)}
    # deltas (0, 2), (3, 4): cosine .8, t = 1.6 / 1.8; half their sum is (1.5, 3)
    close(model_stock(base, [a, b]), {"w": f(1 + 8 / 9 * 1.5, 1 + 8 / 9 * 3)})
    close(model_stock(base, [a, a]), a)
    close(model_stock(base, [a, {"w": f(6.0, 1.0)}]), base)  # at right angles
    # deltas (0, 2), (3, -4): cosine -.8, t = -1.6 / .2 = -8; half the sum is (1.5, -1)
    away = {"w": f(4.0, -3.0)}
    close(model_stock(base, [a, away]), {"w": f(1 - 12.0, 1 + 8.0)})
    close(model_stock(base, [a, away], clamp=True), base)
    close(model_stock(base, [a, {"w": f(1.0, -4.0)}]), base)  # they cancel: t has no value
    # three at pairwise cosine 0, .6, .8: mean 1.4 / 3, t = 1.4 / (1 + 2.8 / 3)
    three = [{"w": f(*x) + 1} for x in ((2.0, 0.0), (0.0, 5.0), (3.0, 4.0))]
    t = 1.4 / (1 + 2.8 / 3)
    close(model_stock(base, three), {"w": f(1 + t * 5 / 3, 1 + t * 9 / 3)})
    frozen = model_stock({"w": base["w"], "v": f(2.0)}, [{"w": a["w"], "v": f(2.0)}] * 2)
    close(frozen, {"w": a["w"], "v": f(2.0)})


def test_breadcrumbs_by_hand():
    base = {"w": f([[1.0, 1.0, 1.0, 1.0, 1.0]]), "scale": tensor(2.0, dtype=torch.float64)}
    a = {"w": 1 + f([[5.0, -1.0, 2.0, -4.0, 3.0]]), "scale": tensor(3.0, dtype=torch.float64)}
    b = {"w": 1 + f([[0.1, 0.2, 0.3, 0.4, -0.5]]), "scale": tensor(2.0, dtype=torch.float64)}
    got = breadcrumbs(base, [a, b], alpha=0.5, beta=0.4, gamma=0.8)  # ranks 2 and 3 of 5 stay: 3 and -4, ...
    close(got, {"w": f([[1.0, 1.0, 1.15, -0.8, 2.5]]), "scale": tensor(2.5, dtype=torch.float64)})
    whole = breadcrumbs(base, [a, b], alpha=0.7, beta=0.0, gamma=1.0)
    close(whole, apply(base, [delta(a, base), delta(b, base)], scale=0.7))
    close(breadcrumbs(base, [a, b], alpha=0.0), base)
    none = breadcrumbs(base, [a], beta=0.9, gamma=0.9)  # nothing kept but the single number
    close(none, {"w": base["w"], "scale": tensor(2.3, dtype=torch.float64)})
    tall = {"w": f([[9.0, 1.0, 2.0], [-3.0, 7.0, 8.0]])}  # by row the middle, over all 2, -3, 7
    zero = {"w": torch.zeros(2, 3, dtype=torch.float64)}
    rows = breadcrumbs(zero, [tall], alpha=1.0, beta=0.3, gamma=0.66, per="row")
    close(rows, {"w": f([[0.0, 0.0, 2.0], [0.0, 7.0, 0.0]])})
    every = breadcrumbs(zero, [tall], alpha=1.0, beta=0.16, gamma=0.66)
    close(every, {"w": f([[0.0, 0.0, 2.0], [-3.0, 7.0, 0.0]])})


def slow_breadcrumbs(base, tuned, beta, gamma, per):
    """Ranks by a stable sort, numpy; beta and gamma in thousandths."""
    tau = (tuned.double() if tuned.dtype == torch.float64 else tuned.float()) - base.to(
        torch.float64 if base.dtype == torch.float64 else torch.float32
    )
    rows = tau.numpy().reshape(-1, tau.shape[-1] if per == "row" else tau.numel())
    n = rows.shape[1]
    top, kept = (1000 - gamma) * n // 1000, (gamma - beta) * n // 1000
    out = np.zeros_like(rows)
    for row, made in zip(rows, out, strict=True):
        order = np.argsort(np.abs(row), kind="stable")[n - top - kept : n - top]
        made[order] = row[order]
    return (torch.from_numpy(out).reshape(base.shape) + base.to(tau.dtype)).to(base.dtype)


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_breadcrumbs_equals_a_sort_with_ties_everywhere(monkeypatch, dtype, per):
    for piece, small in ((37, 0), (7, 1000), (1 << 19, 0)):
        monkeypatch.setattr(_states, "PIECE", piece)
        monkeypatch.setattr(_masks, "PIECE", piece)
        monkeypatch.setattr(_masks, "_SORTED", small)  # 0: the way of large tensors
        for seed, (beta, gamma) in enumerate(
            [(850, 993), (0, 700), (300, 1000), (500, 510), (0, 1000), (400, 400)]
        ):
            base = draw(seed, 9, 11, dtype=dtype)
            fine = base + 0.1 * draw(seed + 50, 9, 11, dtype=dtype)
            few = base * 0 + torch.randint(-2, 3, (9, 11), generator=torch.Generator().manual_seed(seed))
            for start, tuned in ((base, fine), (base * 0, few.to(dtype)), (base, base)):
                got = breadcrumbs(
                    {"w": start}, [{"w": tuned}], alpha=1.0, beta=beta / 1000, gamma=gamma / 1000, per=per
                )
                assert torch.equal(got["w"], slow_breadcrumbs(start, tuned, beta, gamma, per))


def test_breadcrumbs_counts_decimals_as_written():
    base, tuned = {"w": torch.zeros(1000)}, {"w": torch.arange(1.0, 1001.0)}
    kept = breadcrumbs(base, [tuned], alpha=1.0, beta=0.71, gamma=0.99)["w"].nonzero()[
        :, 0
    ]  # .99 - .71: 279.99..
    assert kept.tolist() == list(range(710, 990))


def test_lines_by_hand():
    tau = {f"model.layers.{i}.q": f(10.0, -20.0) for i in (0, 1, 2, 10)} | {"head": f(3.0)}
    got = lines(tau, BLOCKS, 11, alpha=0.1, beta=0.8)
    shares = {0: 0.1, 1: 0.18, 2: 0.26, 10: 0.9}
    close(got, {f"model.layers.{i}.q": f(10.0 * s, -20.0 * s) for i, s in shares.items()} | {"head": f(0.3)})
    named = lines(tau, lambda name: 10 if name == "head" else None, 11, alpha=0.1, beta=0.8)
    close(named, {name: 0.1 * x for name, x in tau.items()} | {"head": f(2.7)})
    one = {"layers.0.w": f(4.0)}
    close(lines(one, BLOCKS, 1, alpha=0.25, beta=0.5), {"layers.0.w": f(1.0)})
    close(lines(tau, BLOCKS, 11, alpha=1.0, beta=0.0), tau)
    base, tuned = MODELS[0], MODELS[1]
    kept = apply(base, [lines(delta(tuned, base), BLOCKS, 2, alpha=0.0, beta=1.0)])
    assert torch.equal(kept[Q], base[Q])  # the first block stays, the last goes all the way
    torch.testing.assert_close(kept[DOWN], tuned[DOWN], rtol=0, atol=1e-7)


def test_lines_alpha_is_free_of_scale():
    taus = [{"w": draw(i, 3, 2), "v": draw(i + 9, 4), "n": tensor([i])} for i in range(4)]
    summed = {n: sum(tau[n] for tau in taus) for n in "wvn"}
    assert lines_alpha(taus, summed) == pytest.approx(1 / 4, abs=1e-12)
    assert lines_alpha(taus, average(taus)) == pytest.approx(1, abs=1e-12)
    assert lines_alpha(taus[:1], taus[0]) == pytest.approx(1, abs=1e-12)


def test_reset():
    tuned, base = {"q": f(1.0), "k": f(2.0), "n": tensor([5])}, {"q": f(0.0), "k": f(0.5), "n": tensor([1])}
    close(reset(tuned, base, []), tuned)
    close(reset(tuned, base, {"q", "n"}), {"q": f(0.0), "k": f(2.0), "n": tensor([1])})
    close(reset(tuned, base, list(base)), base)


def test_select_experts():
    domains = [[0.0, 1.0], [3.0, 0.0], [1.0, 1.0], [-5.0, 0.1]]
    assert select_experts([1.0, 0.2], domains, [0.5, 0.1, 0.7, 0.7], k=3) == ([1, 2, 0], [2, 3, 0])
    scaled = [[x * (i + 2) for x in row] for i, row in enumerate(domains)]
    assert select_experts([9.0, 1.8], scaled, [1, 2, 3, 4], k=1) == ([1], [3])
    assert select_experts([1.0, 0.0], [[2.0, 0.0]] * 3, torch.ones(3), k=3) == ([0, 1, 2], [0, 1, 2])
    models = [{"w": f(float(i))} for i in range(4)]
    near, _ = select_experts([1.0, 0.2], domains, [0.0] * 4, k=1)
    close(average([models[i] for i in near]), models[1])


# Types, ties, pieces


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    a, b, c = ({"w": draw(i, 50, dtype=dtype)} for i in range(3))
    wide = [{"w": s["w"].double()} for s in (a, b, c)]
    for half, whole in (
        (average([a, b, c]), average(wide)),
        (model_stock(a, [b, c]), model_stock(wide[0], wide[1:])),
        (
            apply(a, [delta(b, a), delta(c, a)], scale=0.3),
            apply(wide[0], [delta(x, wide[0]) for x in wide[1:]], scale=0.3),
        ),
    ):
        assert half["w"].dtype == dtype
        assert (half["w"] == whole["w"].to(dtype)).float().mean() > 0.97  # a tie of float32 here and there
    tau = delta(b, a)
    assert tau["w"].dtype == torch.float32
    assert torch.equal(apply(a, [tau])["w"], b["w"])


MERGES = {
    "average": lambda a, b, c: average([a, b, c], [1, 2, 3]),
    "delta": lambda a, b, _: delta(a, b),
    "apply": lambda a, b, c: apply(a, [delta(b, a), delta(c, a)], scale=0.4),
    "model_stock": lambda a, b, c: model_stock(a, [b, c]),
    "breadcrumbs": lambda a, b, c: breadcrumbs(a, [b, c], beta=0.2, gamma=0.9),
    "by row": lambda a, b, c: breadcrumbs(a, [b, c], beta=0.2, gamma=0.9, per="row"),
    "lines": lambda a, _b, _c: lines(a, BLOCKS, 2, alpha=0.2, beta=0.5),
    "reset": lambda a, b, _: reset(a, b, {Q} & a.keys()),
}


@pytest.mark.parametrize("name", MERGES)
def test_pieces_and_layout_change_nothing(monkeypatch, name):
    states = [dict(m) for m in MODELS[:3]]
    copies = [{n: x.clone() for n, x in s.items()} for s in states]
    whole = MERGES[name](*states)
    for before, after in zip(copies, states, strict=True):
        assert all(torch.equal(before[n], after[n]) for n in before)
    monkeypatch.setattr(_states, "PIECE", 3)
    monkeypatch.setattr(_masks, "PIECE", 3)
    for n in states[0]:
        if states[0][n].dim() == 2:
            for s in states:
                s[n] = s[n].t().contiguous().t().requires_grad_()
    parts = MERGES[name](*states)
    for n in whole:
        assert not parts[n].requires_grad
        torch.testing.assert_close(parts[n], whole[n], rtol=0, atol=1e-7)
        parts[n].zero_()  # no result is a window on an input
    assert all(torch.equal(copies[i][n], states[i][n]) for i in range(3) for n in copies[i])


def test_integers_come_from_the_first_and_empty_tensors_pass():
    a = {"w": f(1.0), "steps": tensor([3]), "on": tensor([True]), "none": torch.zeros(0, 3)}
    b = {"w": f(3.0), "steps": tensor([9]), "on": tensor([False]), "none": torch.zeros(0, 3)}
    for name in ("average", "apply", "model_stock", "breadcrumbs", "by row", "delta"):
        got = MERGES[name](a, b, b)
        assert got["steps"].tolist() == [3]
        assert got["on"].tolist() == [True]
        assert got["none"].shape == (0, 3)
    assert got["steps"] is not a["steps"]


def tied(seed):
    w = draw(seed, 3, 2)
    return {"embed": w, "mid": draw(seed + 20, 2), "head": w}


def test_what_is_tied_stays_tied():
    states = [tied(i) for i in range(3)]
    for name in ("average", "apply", "model_stock", "breadcrumbs", "delta"):
        got = MERGES[name](*states)
        assert got["embed"].data_ptr() == got["head"].data_ptr()
    copied = {n: x.clone() for n, x in states[0].items()}  # equal, if not tied: a snapshot of a tied model
    close(average([copied, states[1]]), average(states[:2]))
    assert list(cosines(states[0], states[1:])) == ["embed", "mid"]
    close(reset(states[0], states[1], ["embed", "head"]), states[1] | {"mid": states[0]["mid"]})


# Files


def test_a_file_comes_back_bit_for_bit(tmp_path):
    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.uint8,
        torch.int8,
    )
    state = {f"t.{i}": (10 * draw(i, 3, i + 1)).to(dtype) for i, dtype in enumerate(kinds)}
    state |= {"flag": tensor([True, False]), "scalar": tensor(2.5), "none": torch.zeros(2, 0)}
    state["view"] = draw(40, 4, 6)[1:, ::2]  # not contiguous
    state["é “x” \\"] = f(1.0)
    for out in (tmp_path / "folder", tmp_path / "one.safetensors"):
        assert save(state, out) == out
        again = checkpoint(out)
        assert set(again) == set(state)
        assert list(again) == list(state)
        assert len(again) == len(state)
        for name, x in state.items():
            assert again[name].dtype == x.dtype
            assert torch.equal(again[name], x)
    theirs = load_file(tmp_path / "folder" / "model.safetensors")  # the format's own library reads it
    assert all(torch.equal(theirs[name], x) for name, x in state.items())
    with safe_open(tmp_path / "one.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file({n: x.contiguous() for n, x in state.items()}, tmp_path / "theirs.safetensors")
    mine = checkpoint(tmp_path / "theirs.safetensors")
    assert all(torch.equal(mine[name], x) for name, x in state.items())
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_any_sharding_goes_in_and_out(tmp_path):
    plain = [MODELS[0], MODELS[1]]
    save(plain[0], tmp_path / "a", max_shard=300)
    save(plain[1], tmp_path / "b", max_shard=2000)
    shards = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert shards[0] == f"model-00001-of-{len(shards) - 1:05}.safetensors"
    assert shards[-1] == "model.safetensors.index.json"
    index = json.loads((tmp_path / "a" / shards[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(4 * x.numel() for x in MODELS[0].values())
    for name, shard in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "a" / shard)[name], MODELS[0][name])
    for shard in shards[:-1]:
        held = load_file(tmp_path / "a" / shard)
        assert len(held) == 1 or sum(4 * x.numel() for x in held.values()) <= 300
    state = lazy(lambda *s: average(s), checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b"))
    save(state, tmp_path / "out", max_shard=700)
    close(dict(checkpoint(tmp_path / "out")), average(plain))


@pytest.mark.parametrize("name", MERGES)
def test_a_stream_gives_what_whole_states_give(tmp_path, name):
    paths = [save(MODELS[k], tmp_path / str(k)) for k in range(3)]
    states = [checkpoint(path) for path in paths]
    whole = MERGES[name](*MODELS[:3])
    close(MERGES[name](*states), whole)
    out = save(lazy(MERGES[name], *states), tmp_path / "out")
    close(dict(checkpoint(out)), whole)


def test_reductions_and_chains_read_files_too(tmp_path):
    states = [checkpoint(save(MODELS[k], tmp_path / str(k), max_shard=900)) for k in range(4)]
    deltas = [lazy(delta, state, states[0]) for state in states[1:]]
    merged = lazy(lambda *taus: {n: sum(t[n] for t in taus) for n in taus[0]}, *deltas)
    alpha = lines_alpha(deltas, merged)
    assert alpha == pytest.approx(1 / 3, abs=1e-9)
    whole = [delta(m, BASE) for m in TUNED]
    summed = {n: whole[0][n] + whole[1][n] + whole[2][n] for n in BASE}
    scaled = lazy(lambda tau: lines(tau, BLOCKS, 2, alpha=alpha, beta=0.5), merged)
    got = lazy(lambda base, tau: apply(base, [tau]), states[0], scaled)
    close(dict(got), apply(BASE, [lines(summed, BLOCKS, 2, alpha=1 / 3, beta=0.5)]), 1e-6)
    angles = cosines(states[0], states[1:], group=lambda _: "all")["all"]
    torch.testing.assert_close(angles, cosines(BASE, TUNED, group=lambda _: "all")["all"])
    assert greedy_soup(states, lambda s: float(s[Q].sum()))[1][0] == max(
        range(4), key=lambda k: float(MODELS[k][Q].sum())
    )


def test_a_lazy_result_is_no_window_on_a_file(tmp_path):
    path = save({"a": f(1.0, 2.0), "odd": torch.zeros(0)}, tmp_path / "x.safetensors")
    opened = checkpoint(path)
    for rule in (lambda s: s, lambda s: {n: x[:1] for n, x in s.items()}):
        made = lazy(rule, opened)["a"]
        made.add_(5)
        assert opened["a"].tolist() == lazy(lambda s: s, opened)["a"].tolist() == [1.0, 2.0]
    # Data that does not start at a multiple of the number's size
    text = json.dumps({"b": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    text += b" " * (3 - len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<d", 2.5))
    assert lazy(lambda s: s, checkpoint(path))["b"].tolist() == checkpoint(path)["b"].tolist() == [2.5]


def test_memory_holds_one_tensor_of_each_model(tmp_path, monkeypatch):
    paths = [save(MODELS[k], tmp_path / str(k)) for k in range(4)]
    alive, most = weakref.WeakSet(), []

    def counted(read):
        def reads(*entry):
            x = read(*entry)
            alive.add(x)
            most.append(len(alive))
            return x

        return reads

    monkeypatch.setattr(_files, "_read", counted(_files._read))
    monkeypatch.setattr(_files, "_map", counted(_files._map))
    states = [checkpoint(path) for path in paths]
    opened = len(most)
    save(lazy(lambda base, *tuned: model_stock(base, tuned), *states), tmp_path / "out")
    assert max(most) == 4
    if not hasattr(checkpoint, "__wrapped__"):  # the shape hook looks into the mappings
        assert opened == 0
        assert len(most) == 4 * len(BASE)


def test_save_overwrites_only_when_told_and_copies_the_rest(tmp_path):
    source = save(MODELS[0], tmp_path / "source", max_shard=900)
    for name in ("config.json", "tokenizer.model", "chat_template.jinja", "README.md", "optimizer.bin"):
        (source / name).write_text(name)
    (source / "runs").mkdir()
    for out in (tmp_path / "deep" / "out", tmp_path / "deep" / "one.safetensors"):
        folder = out.suffix == ""
        like = source if folder else None
        save(MODELS[1], out, like=like)
        with pytest.raises(ValueError, match=r"which exists\. Pass overwrite=True"):
            save(MODELS[2], out, like=like)
        assert torch.equal(checkpoint(out)[Q], MODELS[1][Q])
        save(MODELS[2], out, like=like, overwrite=True)
        assert torch.equal(checkpoint(out)[Q], MODELS[2][Q])
    names = {p.name for p in (tmp_path / "deep" / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.model", "chat_template.jinja"}
    assert {p.name for p in (tmp_path / "deep").iterdir()} == {"out", "one.safetensors"}
    (tmp_path / "empty").mkdir()
    save(MODELS[0], tmp_path / "empty")
    assert "w" not in checkpoint(source)


@pytest.mark.errors  # the shape hook would read the old state once more
def test_a_merge_may_replace_its_own_input_which_is_then_closed(tmp_path):
    source = save(MODELS[0], tmp_path / "source", max_shard=900)
    opened = checkpoint(source)
    save(lazy(lambda s: apply(s, [s]), opened), source, overwrite=True, max_shard=900)
    close(dict(checkpoint(source)), {name: 2 * x for name, x in MODELS[0].items()})
    with pytest.raises(ValueError, match=rf"as it was opened, got another before '{DOWN}' was read"):
        opened[DOWN]


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    good = save(MODELS[0], tmp_path / "good")
    before = (good / "model.safetensors").read_bytes()

    def breaks(state):
        if DOWN in state:
            raise RuntimeError("no more")
        return state

    for out in (good, tmp_path / "new", tmp_path / "new.safetensors"):
        with pytest.raises(RuntimeError, match="no more"):
            save(lazy(breaks, checkpoint(good)), out, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
    assert (good / "model.safetensors").read_bytes() == before

    broken = dict(MODELS[1]) | {DOWN: MODELS[1][DOWN].clone()}
    broken[DOWN][2, 3] = math.nan
    save(broken, tmp_path / "nan")
    merged = lazy(lambda *s: average(s), checkpoint(good), checkpoint(tmp_path / "nan"))
    with pytest.raises(ValueError, match=rf"average: expected finite numbers in '{DOWN}', .*states\[1\]"):
        save(merged, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "nan"]

    # The second rename of two fails: the first is taken back
    rename = type(good).rename
    monkeypatch.setattr(type(good), "rename", lambda a, b: 1 / 0 if a.suffix == ".partial" else rename(a, b))
    with pytest.raises(ZeroDivisionError):
        save(MODELS[2], good, overwrite=True)
    assert (good / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "nan"]


@pytest.mark.slow
def test_transformers_loads_what_was_merged(tmp_path):
    from cotkit import lab

    model, tokenizer = lab.load("tiny")
    other, _ = lab.load("tiny", seed=1)
    for name, one in (("a", model), ("b", other)):
        one.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    states = [checkpoint(tmp_path / name) for name in "ab"]
    save(lazy(lambda *s: average(s), *states), tmp_path / "out", like=tmp_path / "a", max_shard=500_000)
    merged, _ = lab.load(str(tmp_path / "out"))
    expected = average([model.state_dict(), other.state_dict()])
    assert expected["lm_head.weight"] is expected["model.embed_tokens.weight"]
    for name, x in merged.state_dict().items():
        torch.testing.assert_close(x, expected[name])


# Refusals


@pytest.mark.errors
def test_states_that_do_not_fit_are_refused_by_name():
    base, good = {"a": f(1.0), "b": f([[1.0, 2.0]])}, {"a": f(2.0), "b": f([[3.0, 5.0]])}
    for name, merged in MERGES.items():
        fn = {"by row": "breadcrumbs"}.get(name, name)
        if fn in ("lines",):
            continue

        def refused(bad, error, text, merged=merged, fn=fn):
            with pytest.raises(error, match=rf"(delta|{fn}): expected {text}"):
                merged(base, bad, good)

        refused({"a": f(2.0)}, ValueError, "the same names in all states, got 'b' in")
        refused(good | {"c": f(1.0)}, ValueError, "the same names in all states, got 'c' in")
        refused(good | {"b": f([[3.0], [5.0]])}, ValueError, r"'b' of one shape, got .*\[2, 1\]")
        refused(
            good | {"b": f([[3.0, 5.0]], dtype=torch.float32)}, ValueError, "'b' of one dtype, got .*float32"
        )
        refused(good | {"b": tensor([[3, 5]])}, ValueError, "'b' of one dtype, got .*int64")
        refused(good | {"b": f([[3.0, math.nan]])}, ValueError, "finite numbers in 'b', got NaN or infinity")
        refused(good | {"b": f([[3.0, -math.inf]])}, ValueError, "finite numbers in 'b'")
        refused(good | {"b": 3.0}, TypeError, "'b' as a tensor, got float")
        refused([1.0], TypeError, r"\S+ as a mapping from names to tensors, got list")
        refused("some/model", TypeError, r"\S+ as a mapping .* merge\.checkpoint\(path\)")
        for kind in (torch.float8_e4m3fn, torch.complex64):
            with pytest.raises(TypeError, match=r"expected 'b' in float16, .* Dequantise"):
                merged(base, good | {"b": torch.zeros(1, 2).to(kind)}, good)
    packed = [{"w": tensor([i], dtype=torch.uint8)} for i in range(2)]
    with pytest.raises(TypeError, match="different uint8 tensors: packed weights"):
        average(packed)
    with pytest.raises(ValueError, match=r"LoRA factor 'q\.lora_A\.weight'"):
        average([{"q.lora_A.weight": f(1.0)}])
    with pytest.raises(ValueError, match=r"finite numbers in 'w', got NaN or infinity: the result overflows"):
        apply({"w": tensor([6e4], dtype=torch.float16)}, [{"w": tensor([6e4])}])
    big = {"w": torch.full((4,), 3e38)}
    assert average([big, big])["w"].isfinite().all()  # their sum would overflow; nothing is wrong with them


@pytest.mark.errors
def test_ties_that_do_not_fit_are_refused_by_name():
    one, loose = tied(1), tied(2) | {"head": draw(9, 3, 2)}
    with pytest.raises(ValueError, match=r"'head' and 'embed' tied in all states, got .* in states\[1\]"):
        average([one, loose])
    with pytest.raises(ValueError, match=r"'head' in states\[0\] but not in states\[1\]"):
        average([one, {n: x for n, x in one.items() if n != "head"}])
    with pytest.raises(
        ValueError, match="'head' and 'embed' treated alike, for they are tied, got False and True"
    ):
        reset(one, tied(3), ["embed"])
    with pytest.raises(ValueError, match="'head' and 'embed' treated alike"):
        lines(one, lambda name: {"head": 1, "embed": 0}.get(name), 2, alpha=0.5, beta=0.5)
    with pytest.raises(ValueError, match="got 'head' tied to 'embed'"):
        save(one, "never-written")


@pytest.mark.errors
def test_arguments_are_refused():
    a, b = {"w": f(1.0)}, {"w": f(2.0)}
    for call, error, text in (
        (lambda: average([]), ValueError, "average: expected at least 1 states in states, got 0"),
        (lambda: average(a), TypeError, "average: expected states as a list of states, got dict"),
        (lambda: average([{}]), ValueError, "expected tensors, got none"),
        (lambda: average([a, b], [1]), ValueError, "one weight per state, got 1 for 2"),
        (lambda: average([a, b], [0, 0]), ValueError, "a weight above 0"),
        (lambda: average([a, b], [2, -1]), ValueError, "weights >= 0, got -1"),
        (lambda: greedy_soup([a, b], lambda _: math.nan), ValueError, "evaluate's score finite, got nan"),
        (lambda: greedy_soup([], lambda _: 1.0), ValueError, "at least 1 states"),
        (lambda: apply(a, [b], scale=math.inf), ValueError, "scale finite"),
        (lambda: model_stock(a, [b]), ValueError, "at least 2 states in states, got 1"),
        (lambda: stock_ratio(0.5, 1), ValueError, "n >= 2"),
        (lambda: stock_ratio(0.5, 2.0), TypeError, "n as an int"),
        (lambda: stock_ratio(-0.6, 3), ValueError, "cosine in"),
        (lambda: cosines(a, []), ValueError, "at least 1 states"),
        (lambda: breadcrumbs(a, [b], beta=0.9, gamma=0.8), ValueError, "beta <= gamma, got 0.9 and 0.8"),
        (lambda: breadcrumbs(a, [b], gamma=1.2), ValueError, r"gamma in \[0, 1\]"),
        (lambda: breadcrumbs(a, [b], per="layer"), ValueError, "per to be one of"),
        (lambda: breadcrumbs(a, []), ValueError, "at least 1 states in tuned"),
        (lambda: lines(a, r"w", 2, alpha=0, beta=1), ValueError, "a group for the number"),
        (lambda: lines({"v": f(1), "w": f(1)}, r"(\d)", 2, alpha=0, beta=1), ValueError, "blocks, got none"),
        (lambda: lines({"l.2": f(1.0)}, r"(\d)", 2, alpha=0, beta=1), ValueError, "0 to 1, got 2 for 'l.2'"),
        (lambda: lines(a, r"(\d)", 0, alpha=0, beta=1), ValueError, "n_blocks >= 1"),
        (lambda: lines_alpha([a], {"w": f(0.0)}), ValueError, "zeros only"),
        (lambda: reset(a, b, ["v"]), ValueError, "names of tensors, got 'v'"),
        (lambda: reset(a, b, "w"), TypeError, "a list of names, got one text"),
        (lambda: select_experts([1.0], [[1.0]], [1.0, 2.0], k=1), ValueError, "scores .N., got"),
        (lambda: select_experts([1.0], [[1.0]], [1.0], k=2), ValueError, r"k in \[1, 1\]"),
        (lambda: select_experts([0.0], [[1.0]], [1.0], k=1), ValueError, "one that is all zeros"),
        (lambda: select_experts([1.0], [[1.0]], [math.nan], k=1), ValueError, "finite scores"),
        (lambda: lazy(lambda s: s), ValueError, "at least 1 states"),
        (lambda: lazy(lambda x, _: x, a, {"v": f(1.0)}), ValueError, "the same names"),
        (lambda: lazy(lambda _: {"v": f(1.0)}, a)["w"], ValueError, r"state with 'w' alone, got \['v'\]"),
        (lambda: lazy(lambda x: x["w"], a)["w"], ValueError, "state with 'w' alone, got Tensor"),
        (lambda: save({}, "never-written"), ValueError, "expected tensors, got none"),
        (lambda: save([1], "never-written"), TypeError, "state as a mapping"),
        (lambda: save({"w": 1.0}, "never-written"), TypeError, "'w' as a tensor, got float"),
        (lambda: save(a, "never-written", max_shard=0), ValueError, "max_shard > 0"),
        (lambda: save(a, "never-written", like="no-folder"), ValueError, "like as a folder"),
    ):  # fmt: skip
        with pytest.raises(error, match=text):
            call()


def raw(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(start, stop, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.errors
def test_files_that_are_broken_are_refused_by_name(tmp_path):
    whole = save(MODELS[0], tmp_path / "whole.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    file = tmp_path / "cut.safetensors"
    last = list(MODELS[0])[-1]
    for size, text in (
        (0, "0 bytes without a whole header"),
        (5, "5 bytes without a whole header"),
        (header - 1, "without a whole header"),
        (header, "'model.embed_tokens.weight' is cut"),
        (header + 95, "'model.embed_tokens.weight' is cut"),
        (header + 96, f"'{list(MODELS[0])[1]}' is cut"),
        (len(whole) - 1, f"'{last}' is cut. The file was not written, or not downloaded, to its end"),
    ):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"checkpoint: .*{text}"):
            checkpoint(file)
    for content, text in (
        (whole + b"x", rf"{len(whole)} bytes in .*, got {len(whole) + 1}"),
        (raw(b"{not json"), "a safetensors header"),
        (raw(b"[1]"), "a safetensors header"),
        (raw({"a": {"dtype": "F32"}}), "a safetensors header"),
        (raw({}, length=1 << 60), "without a whole header"),
        (raw({"a": entry(0, 8)}, bytes(8)), r"\[1\] F32 from byte 0 on for 'a', got bytes 0 to 8"),
        (raw({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "from byte 4 on for 'b', got bytes 0 to 4"),
        (raw({"a": entry(4, 8)}, bytes(8)), "from byte 0 on for 'a'"),
        (raw({"a": entry(0, 4, (-1, -1))}, bytes(4)), "Its header is broken"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint: expected .*{text}"):
            checkpoint(file)
    file.write_bytes(raw({"a": entry(0, 1, dtype="F4")}, bytes(1)))
    with pytest.raises(TypeError, match="got F4 for 'a'"):
        checkpoint(file)

    file.write_bytes(whole)
    opened = checkpoint(file)
    file.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=f"as it was opened, got another before '{last}'"):
        opened[last]
    with pytest.raises(KeyError):
        opened["no such name"]
    with pytest.raises(ValueError, match=r"expected one \.safetensors file, .* got 0 such files"):
        checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got 2 such files"):
        checkpoint(tmp_path)


@pytest.mark.errors
def test_shards_that_do_not_fit_are_refused_by_name(tmp_path):
    state = {"a": f(1.0), "b": f(2.0), "c": f(3.0)}
    folder = save(state, tmp_path / "s", max_shard=8)
    index, first = folder / "model.safetensors.index.json", folder / "model-00001-of-00003.safetensors"
    good = index.read_text()
    name = "model-00001-of-00003.safetensors"

    def refused(change, text):
        content = json.loads(good)
        change(content["weight_map"])
        index.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"checkpoint: expected {text}"):
            checkpoint(folder)

    refused(lambda m: m.update(d=name), f"'d' in {name}, got it in no file")
    refused(lambda m: m.update(b=name), f"'b' in {name}, got it in no file")
    refused(lambda m: m.update(a=m["b"], b=name), "'[ab]' in model-0000[12].*, got it in model-0000[12]")
    refused(lambda m: m.update(c="gone.safetensors"), "'c' in .*gone.safetensors, got no such file")
    refused(lambda m: m.update(c="../x.safetensors"), "file names in")
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"checkpoint: expected (a weight_map|file names) in"):
            checkpoint(folder)
    index.write_text(good)
    save({"a": f(1.0), "c": f(9.0)}, first, overwrite=True)
    with pytest.raises(ValueError, match=r"expected 'c' once, got it in .*00001.* and .*00003"):
        checkpoint(folder)


def test_lazy_states_are_mappings():
    state = lazy(lambda s: s, {"a": f(1.0), "b": f(2.0)})
    assert isinstance(state, Mapping)
    assert list(state) == ["a", "b"]
    assert "a" in state
    assert state.get("z") is None
    assert set(merge.__all__) <= set(dir(merge))
