"""What a model is examined for, and warned of, once."""
