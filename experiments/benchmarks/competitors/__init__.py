"""The competitors: each is a program of its own, `python -m competitors.NAME JOB RESULT`.

All read the same job (see job.py) and train the same rows for the same number of optimizer steps,
with the same model (encoder.py) where they do not bring their own way to build it.
"""
