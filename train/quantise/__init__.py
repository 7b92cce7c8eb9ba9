"""A finished run → its int8 forms, kept only where they stay accurate and are faster."""
