"""What a deployment is measured against, and how its runs are walked."""
