"""Learners by family: gradient descent, exact Bayes, and networks that are meta-trained."""
