"""The error of user input."""


class ConfigError(ValueError):
  """A mistake in the user's input; the message is one line with the remedy."""
