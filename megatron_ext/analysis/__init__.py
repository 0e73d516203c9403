"""What a trained or training model does: where its attention goes, and where its two tasks pull its weights."""
