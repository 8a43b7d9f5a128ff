"""The exception that this folder raises for input it can't accept."""


class ProfileError(ValueError):
    """A model, profile or table is not usable; the message says what was expected and what to do."""
