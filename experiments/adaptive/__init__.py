"""The study of the adaptive rule: README.md, and the program that draws it."""
