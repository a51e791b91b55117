"""`python -m bench`: what a pod start costs, as ratios to yardsticks measured in the same run."""
