"""Pure tensor functions: no state, no Lightning."""

__all__: list[str] = []
