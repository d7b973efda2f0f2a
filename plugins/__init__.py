"""Ground floor: the two scan operators and what every other folder shares with them.

Imports nothing else of this project. So far it holds the errors (`mdm.plugins.errors`).
"""
