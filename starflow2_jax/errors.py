"""What a user can do wrong."""


class UserError(ValueError):
    """Bad input. The message is one sentence for the user: what is wrong and what to do."""
