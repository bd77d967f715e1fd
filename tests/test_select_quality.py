import random

import pytest

from cotkit.select.quality import strata


def test_strata_come_once_twice_three_times():
    scores = list(range(1000))
    random.Random(3).shuffle(scores)
    counts = dict.fromkeys(scores, 0)
    for i in strata(scores):
        counts[scores[i]] += 1
    # linear percentiles of 0..999: 899.1, 949.05, 979.02
    assert [score for score, n in counts.items() if n == 3] == [s for s in scores if s >= 980]
    assert [score for score, n in counts.items() if n == 2] == [s for s in scores if 950 <= s < 980]
    assert [score for score, n in counts.items() if n == 1] == [s for s in scores if 900 <= s < 950]


def test_order_and_cut_offs_by_hand():
    # sorted .1 .3 .5 .9: 25 % between .1 and .3 at 3/4 of the way = .25; 75 % = .5 + .25 * .4 = .6
    assert strata([0.3, 0.9, 0.1, 0.5], percentiles=(75, 25)) == [1, 0, 1, 3]
    assert strata([-2.5], percentiles=(90,)) == [0]


def test_a_score_at_the_cut_off_is_in():
    assert strata([1.0, 2.0, 3.0], percentiles=(50,)) == [1, 2]
    assert strata([0.0, 1.0, 1.0, 1.0]) == [1, 2, 3] * 3  # rows that share a score share their strata
    assert strata([1.0, 2.0], percentiles=(0, 100)) == [0, 1, 1]


def test_strata_equal_the_authors_numbers():
    # main.py: filter_data_func over buffer.py's filter_dataset, cut-offs as main.py takes them
    scores = [
        5.139, 2.238, 5.427, 0.697, 1.537, 2.255, 2.855, 1.631, 2.308, 2.136, 4.435, 1.416, 0.066, 2.661,
        6.65, 0.406, 4.532, 4.374, 0.763, 0.194, 3.813, 3.751, 0.646, 0.423, 1.091, 1.163, 0.331, 1.407,
        0.757, 2.218, 1.631, 2.283, 0.975, 1.241, 0.822, 0.284, 0.324, 2.338, 2.796, 1.839, 2.242, 0.93,
        1.296, 1.74, 0.57, 3.121, 2.343,
    ]  # fmt: skip
    assert strata(scores) == [0, 2, 10, 14, 16, 0, 2, 14, 14]
    half = [0, 1, 2, 5, 6, 7, 8, 9, 10, 13, 14, 16, 17, 20, 21, 29, 30, 31, 37, 38, 39, 40, 43, 45, 46]
    quarter = [0, 2, 6, 10, 13, 14, 16, 17, 20, 21, 38, 45]
    assert strata(scores, percentiles=(50, 75)) == half + quarter


@pytest.mark.errors
def test_refusals():
    with pytest.raises(ValueError, match="strata: expected one finite score per row"):
        strata([1.0, float("nan")])
    with pytest.raises(ValueError, match="expected one finite score per row"):
        strata([])
    with pytest.raises(ValueError, match=r"expected one finite score per row, got shape \[1, 2\]"):
        strata([[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"percentiles in \[0, 100\], got 101"):
        strata([1.0], percentiles=(101,))
    with pytest.raises(ValueError, match="expected percentiles, got none"):
        strata([1.0], percentiles=())
