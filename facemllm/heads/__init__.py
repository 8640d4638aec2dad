"""The renderer: drawn heads with exact labels."""
