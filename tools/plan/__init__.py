"""`mdm plan`: what a build would do, told before it. `command.py` starts it."""
