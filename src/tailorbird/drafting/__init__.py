"""Heads that guess a model's next tokens: what they are (`heads`), and how they learn it (`train`)."""
