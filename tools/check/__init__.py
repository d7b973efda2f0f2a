"""`mdm check`: proof that a deployment computes what the model computes. `command.py` starts it."""
