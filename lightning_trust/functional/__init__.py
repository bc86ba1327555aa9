"""Pure tensor functions: no state, no Lightning."""
