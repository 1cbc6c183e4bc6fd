"""Imported once by the fork server, so that every process of the tests starts with the libraries loaded."""

import warnings

warnings.filterwarnings("ignore")

import tests.train.runs  # noqa: E402, F401
