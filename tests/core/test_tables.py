"""Tables for the terminal."""

from lungddpm.core.tables import DisplayTable


def test_numbers_are_aligned_right_and_words_left():
    table = DisplayTable(["arm", "Dice"], [["real", "0.7"], ["real+[b]@1.0", "−0.12"]], [False, True])
    assert table.text().splitlines() == ["arm            Dice", "real            0.7", "real+[b]@1.0  −0.12"]


def test_no_line_is_longer_than_the_terminal():
    table = DisplayTable(["name"], [["x" * 300]], [False])
    assert max(map(len, table.text(100).splitlines())) <= 100
