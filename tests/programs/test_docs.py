"""What the documents say of the program is what the program is."""

import state_diagram


def test_the_picture_of_the_states_is_that_of_the_table() -> None:
    assert state_diagram.PAGE.read_text() == state_diagram.page(), "run: python scripts/state_diagram.py"
