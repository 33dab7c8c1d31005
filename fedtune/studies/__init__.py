"""Studies: a recipe with [vary] run cell by cell, and what its arms show beside each other.

study_file reads a file, study cuts its grid, tuning and cells run it, evidence and scores read what
came out, comparing puts a `Comparison` together, and files writes it: text, tables and the page.
"""
