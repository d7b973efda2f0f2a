"""The captioned picture world that `mdm-tiny` is trained and measured on.

`scene` says what exists, `render` draws it, `language` speaks about it, and `detect` reads a picture back by
rules of its own; `measure` puts them together. Only `measure` needs torch itself.
"""
