"""Data: the packaged encoder, the demo corpus, opening a user's source, words and labels."""
