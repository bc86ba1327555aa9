"""What the methods share; no method lives here."""

__all__: list[str] = []
