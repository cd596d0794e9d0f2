"""The game and the widgets of the lessons."""
