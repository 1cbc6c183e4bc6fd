"""`mixcpt recall`: a model writes its own rehearsal data (arXiv 2403.01244, 2505.13811; prefixes as in 2406.08464)."""
