"""What the methods share; no method lives here."""
