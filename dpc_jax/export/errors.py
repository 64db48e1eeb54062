"""The one error of this room."""


class ExportError(ValueError):
  """What is wrong with an export, or cannot be exported: one line."""
