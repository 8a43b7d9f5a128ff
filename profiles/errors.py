"""The exception that this folder raises for input it can't accept."""


class ProfileError(ValueError):
    """A model, profile or table is not usable; the message says what was expected and what to do."""


class CorruptModelError(ProfileError):
    """A model's weights are NaN, infinite or too large: what was made of the others is of no use."""
