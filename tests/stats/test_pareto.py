"""The Pareto front: who is on it, and its three points, by hand and by property."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_tune.stats.pareto import CostPoint, pareto_front


def point(name, loss, peak, step_s=1.0):
    return CostPoint(name=name, loss=loss, peak_bytes=peak, step_s=step_s)


def front(*points, margin=0.005):
    return pareto_front(points, practical_margin=margin)


def test_who_is_beaten_in_nothing_is_on_the_front_by_loss():
    found = front(
        point("large", 2.0, 100),
        point("beaten", 2.2, 60),
        point("small", 2.1, 50),
        point("fast", 2.3, 60, 0.5),
    )
    assert found.members == ("large", "small", "fast")


def test_equal_points_are_all_members():
    assert front(point("a", 2.0, 10), point("b", 2.0, 10)).members == ("a", "b")


def test_the_knee_is_farthest_below_the_chord():
    points = [
        point("best", 2.0, 100),
        point("bend", 2.05, 40),
        point("mid", 2.2, 36),
        point("least", 2.4, 30),
    ]
    assert front(*points).knee == "bend"
    straight = [point("best", 1.0, 4), point("above", 3.9, 3), point("least", 4.0, 1)]
    assert front(*straight).knee == "best"


def test_the_smallest_lies_within_the_margin_of_the_best():
    points = [point("best", 2.0, 100), point("near", 2.009, 50), point("far", 2.011, 10)]
    assert front(*points).smallest == "near"
    assert front(*points, margin=0.01).smallest == "far"
    assert front(*points, margin=0.0).smallest == "best"


def test_time_is_left_out_where_it_is_not_known_of_all():
    found = front(point("a", 2.0, 10, 5.0), point("b", 2.1, 20, 0.0))
    assert found.members == ("a",)
    assert front(point("a", 2.0, 10, 5.0), point("b", 2.1, 20, 1.0)).members == ("a", "b")


def test_no_point_is_refused():
    with pytest.raises(ValueError, match="at least one point"):
        front()


@given(
    st.lists(
        st.tuples(st.floats(0.5, 4), st.integers(1, 9), st.floats(0.1, 3)), min_size=1, max_size=8
    ),
    st.randoms(use_true_random=False),
)
def test_the_front_has_the_best_hides_nobody_unbeaten_and_knows_no_order(values, random):
    points = [point(f"{i}", *value) for i, value in enumerate(values)]
    found = front(*points)
    by_name = {p.name: p for p in points}
    shuffled = points[:]
    random.shuffle(shuffled)
    assert front(*shuffled) == found
    assert {found.best, found.knee, found.smallest} <= set(found.members)
    assert by_name[found.best].loss == min(p.loss for p in points)
    for p in points:
        beaten = any(
            by_name[m].loss <= p.loss
            and by_name[m].peak_bytes <= p.peak_bytes
            and by_name[m].step_s <= p.step_s
            for m in found.members
            if m != p.name
        )
        assert beaten or p.name in found.members
