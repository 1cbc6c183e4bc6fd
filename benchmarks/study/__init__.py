"""The study of docs/study.md: its texts and mixtures (prepare.py) and its configurations."""
