"""What the notebooks share: the model, figures, checkers, source listings and recorded results."""
