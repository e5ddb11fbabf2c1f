"""Scores, figures and reports of registrations, and the comparison with other methods."""
