"""Models with Batch Layer Normalization."""
