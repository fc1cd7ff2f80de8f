"""Pictures of plans, as SVG and, where they fit, as text for a terminal. Nothing here imports torch."""
