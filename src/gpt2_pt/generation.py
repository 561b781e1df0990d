"""Text from a model."""


class GenerationMixin:
    """Placeholder."""
