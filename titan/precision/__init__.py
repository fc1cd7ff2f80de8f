"""Number formats: mixed precision."""
