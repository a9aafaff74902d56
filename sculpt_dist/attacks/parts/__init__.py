"""What several attacks share: the model under attack, and the search for tokens."""
