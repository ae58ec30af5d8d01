"""The error that a user reads."""


class ConfigError(ValueError):
  """A mistake in the user's input, told in one line that says what to do."""
