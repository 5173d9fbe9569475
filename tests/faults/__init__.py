"""Whole jobs under faults: real workers and a real Redis, killed and stopped, and what is promised checked afterwards.

    python -m tests.faults --jobs 300 --kills 20 --redis-kills 2 --stops 3 --seed 1

`campaign` does it and leaves a history, `checker` judges the history alone, `drills` fail one worker at one point.
"""
