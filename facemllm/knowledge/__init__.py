"""What is known of facial characteristics together: which occur with which, and what excludes or follows from what.

After FaceInsight (arXiv 2504.15624). `relations` holds logic as data, `graph` counts the training labels, `penalties`
makes both into losses; only the last needs torch.
"""
