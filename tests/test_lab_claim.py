"""claim: hand arithmetic, every verdict, and the calibration of the interval on simulated runs."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from cotkit.lab import _interval
from cotkit.lab._claim import claim, false_verdicts, holm, load_claims
from cotkit.lab._table import code_hash, pack, save_table, table, unpack

ENTRY = {
    "paper": "L0",
    "sentence": "new beats old",
    "arm": "new",
    "control": "old",
    "metric": "accuracy",
    "smallest_effect": 0.02,
}


def judge(results, *, fields=None, **keywords):
    return claim("toy", results, claims={"toy": ENTRY | (fields or {})}, **keywords)


def runs(differences, old=0.5):
    """One number a run: old is constant, new is old + difference."""
    d = np.asarray(differences, dtype=float)
    return {"old": np.full((len(d), 1), old), "new": (old + d)[:, None]}


# --- Student's t


@pytest.mark.parametrize(
    ("df", "t"),
    [(1, 12.7062), (2, 4.30265), (4, 2.776445), (7, 2.364624), (30, 2.042272), (math.inf, 1.959964)],
)
def test_t_quantiles_of_the_printed_tables(df, t):
    assert _interval.quantile(0.05, df) == pytest.approx(t, rel=2e-6)
    assert _interval.two_sided_p(t, df) == pytest.approx(0.05, rel=2e-5)


def test_t_has_closed_forms_at_df_1_and_2():
    assert _interval.two_sided_p(3.0, 1) == pytest.approx(1 - 2 / math.pi * math.atan(3.0), abs=1e-12)
    assert _interval.two_sided_p(-3.0, 2) == pytest.approx(1 - 3 / math.sqrt(11), abs=1e-12)
    assert _interval.two_sided_p(0.0, 5) == 1.0


# --- the interval by hand


def test_paired_t_over_five_seeds():
    c = judge(runs([0.02, 0.05, 0.03, 0.06, 0.04]))
    # mean .04, s = sqrt(.001 / 4) = .0158114, standard error .00707107, t_4 = 2.776445 -> half .0196324
    assert c.effect == pytest.approx(0.04, abs=1e-12)
    assert c.high - c.effect == pytest.approx(2.7764451 * math.sqrt(0.001 / 4 / 5), rel=1e-7)
    assert (c.df, c.seeds, c.bases, c.runs) == (4, 5, 1, 5)
    # p: t = .04 / .00707107 = 5.65685 at df 4
    assert c.p == pytest.approx(_interval.two_sided_p(0.04 / math.sqrt(0.001 / 4 / 5), 4), rel=1e-9)
    # a share of the remaining error: .04 / (1 - .5)
    assert c.error_removed == pytest.approx(0.08, abs=1e-12)


def test_bases_widen_the_interval_to_their_own_t():
    # base means .02, .05, .08: mean .05, s .03, standard error .0173205, t_2 = 4.302653 -> half .0745241
    # seed means .04, .05, .06: s .01, standard error .0057735, t_2 -> .0248: the wider one counts
    d = np.array([[0.01, 0.02, 0.03], [0.04, 0.05, 0.06], [0.07, 0.08, 0.09]])
    c = judge({"old": np.full((3, 3, 1), 0.5), "new": 0.5 + d[:, :, None]})
    assert (c.bases, c.seeds, c.runs, c.df) == (3, 3, 9, 2)
    assert c.high - c.effect == pytest.approx(4.302653 * 0.03 / math.sqrt(3), rel=1e-6)
    assert c.p == pytest.approx(_interval.two_sided_p(0.05 / (0.03 / math.sqrt(3)), 2), rel=1e-9)


def test_seeds_of_their_own_on_each_base_count_as_bases():
    import pandas as pd

    rows = [
        {"arm": arm, "base": b, "seed": 10 * b + s, "accuracy": 0.5 + (arm == "new") * (0.03 * b + 0.01 * s)}
        for arm in ("old", "new")
        for b in range(3)
        for s in range(2)
    ]
    c = judge(pd.DataFrame(rows))
    # base means .005, .035, .065: s .03, t_2
    assert c.effect == pytest.approx(0.035, abs=1e-12)
    assert c.high - c.effect == pytest.approx(4.302653 * 0.03 / math.sqrt(3), rel=1e-6)


def test_questions_that_all_runs_share_widen_the_interval():
    # Differences per question: +.4 and -.2 in every run (mean .1); residuals +-.3 in each run, always alike.
    d = np.array([[0.4, -0.2], [0.4, -0.2], [0.4, -0.2]])
    # products of two runs' residuals: .09 for every pair and question -> variance .09, over 2 questions .045
    assert _interval.shared_variance(d) == pytest.approx(0.045, abs=1e-12)
    c = judge({"old": np.full((3, 2), 0.5), "new": 0.5 + d})
    assert c.high - c.effect == pytest.approx(1.959964 * math.sqrt(0.045), rel=1e-6)
    # opposite residuals in different runs share nothing
    assert _interval.shared_variance(np.array([[0.4, -0.2], [-0.2, 0.4], [0.1, 0.1]])) == 0.0


def test_pairing_matters():
    rng = np.random.default_rng(5)
    seed_effect = np.linspace(-0.1, 0.1, 6)
    old = 0.5 + seed_effect
    new = old + 0.03 + rng.normal(0, 0.004, 6)
    paired = judge({"old": old[:, None], "new": new[:, None]})
    shuffled = judge({"old": old[:, None], "new": new[[3, 5, 0, 4, 1, 2]][:, None]})
    assert paired.verdict in ("supported", "right direction")
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_nan_questions_are_left_out_in_pairs():
    nan = math.nan
    old = np.array([[0.1, 0.5, nan], [0.1, 0.5, 0.3], [0.1, 0.5, 0.9]])
    new = np.array([[0.3, nan, 0.7], [0.3, 0.9, 0.8], [0.3, 0.9, 0.8]])
    # run 0 keeps question 0: .2; run 1: (.2 + .4 + .5) / 3; run 2: (.2 + .4 - .1) / 3
    assert judge({"old": old, "new": new}).effect == pytest.approx((0.2 + 1.1 / 3 + 0.5 / 3) / 3, abs=1e-12)


# --- verdicts


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.050, 0.051, 0.049], "supported"),
        ([0.018, 0.026, 0.022], "right direction"),
        ([0.001, -0.001, 0.002], "no difference"),
        ([-0.050, -0.051, -0.049], "opposite"),
        ([0.05, -0.05, 0.02], "inconclusive"),
    ],
)
def test_verdicts(differences, verdict):
    c = judge(runs(differences))
    assert c.verdict == verdict
    flipped = judge(runs([-x for x in differences]), fields={"greater": False})
    assert flipped.verdict == verdict
    assert flipped.effect == pytest.approx(-c.effect, abs=1e-12)


def test_direction_flips_the_verdict():
    assert judge(runs([0.05, 0.051, 0.049]), fields={"greater": False}).verdict == "opposite"


def test_threshold_claim_against_a_number():
    fields = {"control": 1.0, "greater": False}
    c = judge({"new": [[0.90], [0.91], [0.92]]}, fields=fields)
    assert c.effect == pytest.approx(-0.09, abs=1e-12)
    assert c.verdict == "supported"
    assert math.isnan(c.error_removed)


def test_within_is_an_interval_inside_the_margin():
    fields = {"within": 0.02}
    assert judge(runs([0.001, -0.001, 0.002]), fields=fields).verdict == "supported"
    assert judge(runs([0.015, 0.019, 0.010]), fields=fields).verdict == "inconclusive"
    far = judge(runs([0.050, 0.051, 0.049]), fields=fields)
    assert (far.verdict, far.p_smallest) == ("opposite", 1.0)
    # margin .02 - |effect| .0006667 over the standard error .0008819
    near = judge(runs([0.001, -0.001, 0.002]), fields=fields)
    se = np.std([0.001, -0.001, 0.002], ddof=1) / math.sqrt(3)
    assert near.p_smallest == pytest.approx(_interval.two_sided_p((0.02 - 0.002 / 3) / se, 2), rel=1e-9)


def test_trend_is_the_fitted_change_from_first_to_last():
    fields = {"arms": ["a", "b", "c"], "trend": [0, 1, 3], "smallest_effect": 0.1}
    entry = {"toy": {k: v for k, v in (ENTRY | fields).items() if k not in ("arm", "control")}}
    results = {"a": [[0.1], [0.2], [0.1]], "b": [[0.3], [0.4], [0.3]], "c": [[0.7], [0.8], [0.7]]}
    c = claim("toy", results, claims=entry)
    # every run lies on a line of slope .2: change .6 over 3
    assert c.effect == pytest.approx(0.6, abs=1e-12)
    assert c.verdict == "supported"
    bent = results | {"b": [[0.0], [0.1], [0.0]]}
    c = claim("toy", bent, claims=entry)
    assert (c.verdict, "a to b" in c.note) == ("right direction", True)


def test_precondition_is_measured_or_given():
    need = {"text": "headroom", "arm": "old", "metric": "accuracy", "at_most": 0.9}
    good = [0.050, 0.051, 0.049]
    assert judge(runs(good), fields={"precondition": need}).verdict == "supported"
    c = judge(runs(good, old=0.93), fields={"precondition": need})
    assert (c.verdict, c.note) == ("not testable here", "headroom: 0.930, does not hold")
    only_text = {"precondition": {"text": "many paths"}}
    assert judge(runs(good), fields=only_text, precondition=False).verdict == "not testable here"
    assert judge(runs(good), fields=only_text, precondition=True).verdict == "supported"


def test_one_seed_is_a_bootstrap_over_questions_and_says_so():
    rng = np.random.default_rng(1)
    old = (rng.random(400) < 0.5).astype(float)
    new = np.where(rng.random(400) < 0.3, 1.0, old)
    c = judge({"old": old[None], "new": new[None]}, one_seed=True)
    assert c.verdict == "supported (questions only, one seed)"
    # close to the normal interval of the paired differences
    assert c.high - c.low == pytest.approx(2 * 1.96 * np.std(new - old) / 20, rel=0.1)
    assert judge({"old": old[None], "new": new[None]}, one_seed=True).low == c.low


def test_nothing_run_and_stale_tables_give_no_verdict(tmp_path):
    assert judge(None).verdict == "not run here"
    code = tmp_path / "code.py"
    code.write_text("x = 1\n")
    path = save_table(
        tmp_path / "t.csv",
        [{"arm": a, "seed": s, "accuracy": [a == "new"]} for a in ("old", "new") for s in range(3)],
        settings={},
        code=[code],
    )
    assert judge(table(path)).verdict == "supported"
    code.write_text("x = 2\n")
    c = judge(table(path))
    assert (c.verdict, c.effect) == ("stale", 1.0)


def test_reported_numbers_stand_beside_ours():
    c = judge(
        runs([0.05, 0.06, 0.07]),
        fields={"reported": {"effect": 0.0224, "control": 0.44, "basis": "abstract"}},
    )
    # ours .06 / .5, theirs .0224 / .56
    assert c.error_removed == pytest.approx(0.12, abs=1e-12)
    assert c.reported_error_removed == pytest.approx(0.04, abs=1e-12)
    assert "abstract" in c.cells()["paper"]
    for shown in (c._repr_html_(), c._repr_markdown_()):
        assert "supported" in shown
        assert "+0.060" in shown


def test_share_of_the_grid_and_of_the_runs():
    c = judge(runs([0.05, -0.01, 0.07]), grid={1e-4: (0.6, 0.5), 2e-4: (0.6, 0.5), 3e-4: (0.4, 0.5)})
    assert c.grid_share == pytest.approx(2 / 3)
    assert c.cells()["sign holds"] == "in 67% of runs, 67% of settings"
    assert c.sign_share == pytest.approx(2 / 3)


def test_fewer_seeds_than_planned_are_noted():
    assert judge(runs([0.05, 0.06, 0.07]), fields={"seeds": 5}).note == "planned 5 seeds, ran 3"


def test_all_kinds_of_results_give_one_answer(tmp_path):
    import pandas as pd

    rng = np.random.default_rng(3)
    arms = {a: (rng.random((3, 4, 20)) < p).astype(float) for a, p in (("old", 0.4), ("new", 0.6))}
    records = [
        {"arm": a, "base": b, "seed": s, "accuracy": arms[a][b, s]}
        for a in arms
        for b in range(3)
        for s in range(4)
    ]
    first = repr(judge(arms))
    assert repr(judge(pd.DataFrame(records))) == first
    assert repr(judge(pd.DataFrame(records[::-1]))) == first
    assert repr(judge(table(save_table(tmp_path / "t.csv", records, settings={})))) == first


# --- calibration


def simulate(rng, *, effect, bases, seeds, questions, base_arm, seed_arm, run_arm, question_arm):
    """Right or wrong answers of two arms, crossed; every factor also moves the difference of the arms."""
    logit = (
        rng.normal(0, 1.5, questions) + rng.normal(0, 0.3, (bases, 1, 1)) + rng.normal(0, 0.2, (1, seeds, 1))
    )
    shift = (
        rng.normal(0, base_arm, (bases, 1, 1))
        + rng.normal(0, seed_arm, (1, seeds, 1))
        + rng.normal(0, run_arm, (bases, seeds, 1))
        + rng.normal(0, question_arm, questions)
    )
    answers = []
    for side in (-0.5, 0.5):
        right = 1 / (1 + np.exp(-(logit + side * shift)))
        # the effect is added in probability, so that its true size is known
        answers.append((rng.random(right.shape) < np.clip(right + side * effect, 0, 1)).astype(float))
    return answers[1] - answers[0]


@pytest.mark.parametrize(
    "varies",
    [
        {"bases": 1, "seeds": 5, "base_arm": 0, "seed_arm": 0.1, "run_arm": 0, "question_arm": 0},
        {"bases": 1, "seeds": 5, "base_arm": 0, "seed_arm": 0.05, "run_arm": 0, "question_arm": 0.8},
        {"bases": 3, "seeds": 5, "base_arm": 0, "seed_arm": 0, "run_arm": 0.1, "question_arm": 0.3},
        {"bases": 3, "seeds": 5, "base_arm": 0.2, "seed_arm": 0, "run_arm": 0.1, "question_arm": 0.3},
        {"bases": 3, "seeds": 5, "base_arm": 0.1, "seed_arm": 0.1, "run_arm": 0.05, "question_arm": 0.3},
        {"bases": 3, "seeds": 3, "base_arm": 0.05, "seed_arm": 0.1, "run_arm": 0.05, "question_arm": 0},
    ],
    ids=["one base", "questions vary", "runs vary", "bases vary", "bases and seeds vary", "three by three"],
)
def test_false_verdicts_stay_at_5_percent(varies):
    rng = np.random.default_rng(11)
    cases, questions, false = 1000, 200, 0
    for _ in range(cases):
        d = simulate(rng, effect=0.0, questions=questions, **varies).reshape(-1, questions)
        bases = list(np.repeat(np.arange(varies["bases"]), varies["seeds"]))
        seeds = list(range(varies["seeds"])) * varies["bases"]
        false += abs(d.mean()) > _interval.half_width(_interval.spread(d, bases, seeds), 0.05)
    assert false / cases <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / cases)


def test_the_interval_covers_a_known_gap_in_95_percent():
    rng = np.random.default_rng(12)
    cases, covered = 1000, 0
    for _ in range(cases):
        d = 0.05 + rng.normal(0, 0.03, (5, 1)) + rng.normal(0, 0.4, (5, 100))
        c = (
            judge({"old": np.zeros((5, 100)), "new": d}, fields={"smallest_effect": 0.0})
            if covered < 5
            else None
        )
        half = _interval.half_width(_interval.spread(d, [0] * 5, list(range(5))), 0.05)
        if c is not None:  # claim reports this very interval
            assert c.high == pytest.approx(d.mean() + half, abs=1e-12)
        covered += abs(d.mean() - 0.05) <= half
    # 95 % but for the questions' share, which can only widen it
    assert 0.95 - 2 * 0.0069 <= covered / cases <= 0.98


def test_a_percentile_bootstrap_over_seeds_would_not_do():
    """Why t: at 3 seeds the bootstrap leaves out zero in far more than 5 % of null cases."""
    rng = np.random.default_rng(13)
    false = 0
    for _ in range(400):
        d = rng.normal(0, 1, 3)
        means = d[rng.integers(0, 3, (500, 3))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        false += low > 0 or high < 0
    assert false / 400 > 0.14


def test_false_verdicts_on_the_runs_themselves():
    # three runs with differences .03, .031, .029: only the 2 of 8 patterns without a swap or with all swapped
    # leave out zero: half is 4.303 * .001 / sqrt 3 = .0025, the mean .03
    results = {"a": [[0.53], [0.531], [0.529]], "b": [[0.5], [0.5], [0.5]]}
    assert false_verdicts(results, "a", "b", "accuracy") == (0.25, 8)
    rng = np.random.default_rng(14)
    twins = {name: 0.5 + rng.normal(0, 0.02, (3, 5, 1)) for name in ("sft", "again")}
    share, patterns = false_verdicts(twins, "sft", "again", "accuracy", draws=500)
    assert patterns == 500
    assert share <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 500)


def test_holm_by_hand():
    # sorted .01 .02 .03 .5: 4 * .01 = .04, 3 * .02 = .06, max(.06, 2 * .03) = .06, .5
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06], abs=1e-12)
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([]) == []


def test_p_is_where_the_interval_touches():
    terms = [(0.01, 4.0, "seeds"), (0.012, 2.0, "bases"), (0.006, math.inf, "questions")]
    p = _interval.p_value(0.04, terms)
    assert _interval.half_width(terms, p) == pytest.approx(0.04, rel=1e-5)
    assert _interval.p_value(0.0, [(0.0, 2.0, "seeds")]) == 1.0
    assert _interval.p_value(0.1, [(0.0, 2.0, "seeds")]) == 0.0


# --- saved tables


def test_cells_pack_and_unpack():
    assert pack([1, 0, True, math.nan]) == "b101-"
    assert pack(0.25) == "f0.25"
    values = np.array([0.333333, math.nan, 2.0])
    assert pack(values) == "f0.3333 - 2"
    np.testing.assert_allclose(unpack(pack(values)), [0.3333, math.nan, 2.0])
    np.testing.assert_array_equal(unpack("b01-"), [0.0, 1.0, math.nan])


def test_hash_ignores_words_and_sees_numbers(tmp_path):
    file = tmp_path / "f.py"
    file.write_text('"""Words."""\ndef f(x):\n    """More."""\n    return x + 1  # why\n')
    first = code_hash(file)
    file.write_text('def f(x):\n\n    """Other words."""\n    return (x + 1)\n')
    assert code_hash(file) == first
    file.write_text("def f(x):\n    return x - 1\n")
    assert code_hash(file) != first
    file.write_text("def f(x):\n    return x + 1\n")
    assert code_hash(file) == first


def test_hash_of_one_function_follows_what_it_uses(tmp_path):
    file = tmp_path / "f.py"
    code = (
        "RATE = 2\ndef helper(x):\n    return RATE * x\n"
        "def f(x):\n    return helper(x)\ndef g(x):\n    return x\n"
    )
    file.write_text(code)
    first = code_hash(file, "f")
    assert first != code_hash(file) != code_hash(file, "g") != first
    file.write_text(code.replace("    return x\n", "    return -x\n"))  # g changed
    assert code_hash(file, "f") == first
    for old, new in (
        ("RATE = 2", "RATE = 3"),
        ("RATE * x", "RATE + x"),
        ("helper(x)\ndef g", "helper(-x)\ndef g"),
    ):
        assert old in code
        file.write_text(code.replace(old, new))
        assert code_hash(file, "f") != first
    assert code_hash(file, "gone") == "missing"
    path = save_table(
        tmp_path / "t.csv", [{"arm": "a", "seed": 0, "m": [1]}], settings={}, code=[f"{file}::g"]
    )
    assert table(path).stale == []
    file.write_text(code.replace("    return x\n", "    return -x\n"))
    assert table(path).stale == [f"{file}::g changed"]


def test_table_says_what_changed(tmp_path):
    code = tmp_path / "sub" / "code.py"
    code.parent.mkdir()
    code.write_text("x = 1\n")
    path = save_table(
        tmp_path / "r" / "t.csv",
        [{"arm": "a", "seed": 4, "accuracy": [1, 0], "length": [3.5, 4.25]}],
        settings={"lr": 0.1, "steps": 60},
        code=[code],
    )
    fresh = table(path, settings={"steps": 60, "lr": 0.1})
    assert fresh.stale == []
    assert list(fresh.rows.columns) == ["arm", "base", "seed", "accuracy", "length"]
    assert fresh.rows["seed"][0] == 4
    np.testing.assert_array_equal(fresh.rows["length"][0], [3.5, 4.25])
    assert table(path, settings={"lr": 0.2, "steps": 60}).stale == ["settings changed"]
    code.write_text("x = 2\n")
    assert table(path).stale == [f"{code} changed"]
    assert table(path, code=[]).stale == []
    assert "other.py is not on record" in table(path, code=["other.py"]).stale
    path.with_suffix(".json").unlink()
    assert table(path).stale == ["no record of code and settings"]


def test_recorded_files_are_found_above_the_table(tmp_path):
    (tmp_path / "lib.py").write_text("x = 1\n")
    path = save_table(tmp_path / "a" / "b" / "t.csv", [{"arm": "a", "seed": 0, "m": 1}], settings={})
    info = json.loads(path.with_suffix(".json").read_text())
    info["code"] = {"lib.py": code_hash(tmp_path / "lib.py")}
    path.with_suffix(".json").write_text(json.dumps(info))
    assert table(path).stale == []


def test_claims_file_is_found_and_valid(monkeypatch):
    from pathlib import Path

    notebooks = Path(__file__).parents[1] / "notebooks"
    entries, folder = load_claims(notebooks / "claims.toml")
    assert folder == notebooks
    for name, entry in entries.items():
        c = claim(name, None, claims=entries)
        assert c.verdict == "not run here"
        assert {"paper", "sentence", "seeds", "bases", "questions", "date", "notebook"} <= set(entry), name
        assert str(entry["sentence"]).endswith("."), name
    monkeypatch.chdir(notebooks.parent)
    assert load_claims()[0] == entries


# --- the page of all claims


@pytest.fixture
def script():
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[1] / "scripts" / "claims_md.py"
    spec = importlib.util.spec_from_file_location("claims_md", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOML = """
[aa]
table = "results/a.csv"
arm = "old"
twin = "again"
metric = "accuracy"

[claims.up]
paper = "L0"
sentence = "New beats old."
arm = "new"
control = "old"
metric = "accuracy"
smallest_effect = 0.02
table = ["results/a.csv", "results/later.csv"]
pinned = "tests/test_x.py"

[claims.same]
paper = "L0"
sentence = "Old equals old again."
arm = "again"
control = "old"
metric = "accuracy"
within = 0.02
table = "results/a.csv"
"""


def sweep(folder, gain):
    (folder / "claims.toml").write_text(TOML)
    records = [
        {"arm": arm, "seed": s, "accuracy": 0.5 + 0.001 * (-1) ** s + step + 0.001 * s * (arm == "new")}
        for arm, step in (("old", 0.0), ("again", 0.0), ("new", gain))
        for s in range(4)
    ]
    save_table(folder / "results" / "a.csv", records, settings={})


def test_the_page_of_claims(tmp_path, script, capsys):
    sweep(tmp_path, 0.1)
    assert script.main(["--claims", str(tmp_path / "claims.toml")]) == 0
    page = (tmp_path / "CLAIMS.md").read_text()
    assert "`results/a.csv`: old against again (accuracy): 0.0% false verdicts in 16 null cases" in page
    assert (
        "| **up**: New beats old. | L0 | `tests/test_x.py` | no | supported (a)<br>not run here (later) |"
        in page
    )
    assert "supported (a) | not run |" in page.split("**same**")[1]
    out = capsys.readouterr().out
    assert "up: +0.101 [" in out  # gains .100 .101 .102 .103, mean .1015 (just below, in binary)
    assert "up: not run here (later)" in out
    # a supported claim that turns fails the check; one that merely fades does not
    sweep(tmp_path, 0.0)
    assert script.main(["--check", "--claims", str(tmp_path / "claims.toml")]) == 0
    sweep(tmp_path, -0.1)
    assert script.main(["--check", "--claims", str(tmp_path / "claims.toml")]) == 1
    assert "up on results/a.csv: recorded as supported, now opposite" in capsys.readouterr().out
    assert (tmp_path / "CLAIMS.md").read_text() == page


def test_holm_takes_verdicts_down_by_a_step(script):
    assert script.after_holm("supported", 0.01, 0.2, "difference") == "right direction"
    assert script.after_holm("supported", 0.2, 0.2, "difference") == "inconclusive"
    assert script.after_holm("supported", 0.2, 0.2, "within") == "inconclusive"
    assert script.after_holm("supported", 0.01, 0.04, "trend") == "supported"
    assert script.after_holm("opposite", 0.2, 1.0, "difference") == "inconclusive"
    label = " (questions only, one seed)"
    assert script.after_holm("right direction" + label, 0.2, 1.0, "difference") == "inconclusive" + label
    # two claims with p = .03 each do not survive together, one alone does
    one = judge(runs([0.05, 0.09, 0.07]))
    alone, pair = script.corrected([one]), script.corrected([one, one._replace(p=0.049, p_smallest=0.049)])
    assert alone[0][0] == pytest.approx(one.p)
    assert pair[0][0] == pytest.approx(2 * one.p)
    assert script.corrected([judge(None)])[0][1] == "not run here"


# --- refusals


@pytest.mark.errors
@pytest.mark.parametrize(
    ("results", "fields", "message"),
    [
        (runs([0.1, 0.2]), {}, "at least 3 seeds, got 2"),
        ({"old": np.zeros((2, 3, 1)), "new": np.ones((2, 3, 1))}, {}, "1 base or at least 3, got 2"),
        ({"new": [[0.1]] * 3}, {}, "expected arm 'old'"),
        ({"old": [0.1, 0.2, 0.3], "new": [0.1, 0.2, 0.3]}, {}, r"as \[seeds, questions\]"),
        ({"old": [[0.1]] * 3, "new": [[0.1]] * 4}, {}, "the same runs"),
        ({"old": [[0.1]] * 3, "new": [[0.1, 0.2]] * 3}, {}, "one number of questions"),
        ({"old": [[math.nan]] * 3, "new": [[0.1]] * 3}, {}, "a question with a number"),
        (runs([0.1] * 3), {"speed": 1}, r"unknown \['speed'\]"),
        (runs([0.1] * 3), {"smallest_effect": -0.1}, "expected smallest_effect above 0"),
        (runs([0.1] * 3), {"precondition": {"text": "many paths"}}, "expected precondition="),
        (runs([0.1] * 3), {"trend": [0, 1]}, "a growing setting"),
        (runs([0.1] * 3), {"arms": ["new", "old"]}, "expected one arm"),
    ],
)
def test_refusals(results, fields, message):
    with pytest.raises(ValueError, match=message):
        judge(results, fields=fields)


@pytest.mark.errors
def test_more_refusals(tmp_path):
    import pandas as pd

    with pytest.raises(ValueError, match="Write the claim down first"):
        claim("other", None, claims={"toy": ENTRY})
    with pytest.raises(ValueError, match="got none at"):
        load_claims(tmp_path / "claims.toml")
    with pytest.raises(TypeError, match="got list"):
        judge([1, 2, 3])
    with pytest.raises(ValueError, match="one run with one_seed=True"):
        judge(runs([0.1] * 3), one_seed=True)
    twice = pd.DataFrame([{"arm": a, "seed": 0, "accuracy": 1.0} for a in ("new", "new", "old")])
    with pytest.raises(ValueError, match="got 'new' twice"):
        judge(twice)
    with pytest.raises(ValueError, match="expected a column 'accuracy'"):
        judge(twice.rename(columns={"accuracy": "x"}))
    with pytest.raises(ValueError, match="at least one run"):
        save_table(tmp_path / "t.csv", [], settings={})
    with pytest.raises(ValueError, match="in every run"):
        save_table(
            tmp_path / "t.csv", [{"arm": "a", "seed": 0, "m": 1}, {"arm": "a", "seed": 1}], settings={}
        )
    with pytest.raises(ValueError, match="without comma"):
        save_table(tmp_path / "t.csv", [{"arm": "a,b", "seed": 0, "m": 1}], settings={})
    with pytest.raises(ValueError, match="one number per question"):
        save_table(tmp_path / "t.csv", [{"arm": "a", "seed": 0, "m": [[1]]}], settings={})
    with pytest.raises(ValueError, match="which is not there"):
        table(tmp_path / "missing.csv")
    with pytest.raises(ValueError, match="expected a cell"):
        unpack("12")
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        holm([1.5])


def test_nothing_heavy_is_imported():
    code = (
        "import sys; import cotkit.lab._claim, cotkit.lab._show, cotkit.lab._data, cotkit.lab._setup;"
        "heavy = ('pandas', 'matplotlib', 'IPython', 'transformers', 'datasets');"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
