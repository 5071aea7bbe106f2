"""A model melded once, into a directory to train from: written layer by layer, read by mapping."""
