"""`mdm bench`: what things cost, as ratios measured in one run. Times on a shared machine move; ratios hold."""
