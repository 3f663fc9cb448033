"""The whole drill at the pace of cron, in four copies."""

from bench import drill


def test_four_copies_are_done_within_an_hour():
    expected = drill.expected_minutes(drill.CRON_PERIOD_S)
    names = sorted(drill.ORDER, key=lambda name: -expected[name])

    assert set(expected) == set(drill.ORDER)
    assert drill._wall_minutes(names, expected, 4) < 60
    assert drill._wall_minutes(names, expected, 1) == sum(expected.values())
