"""The paper's tables and figures on the embedded model: `python -m lab.reproduce`.

plan says what is run, measure runs one example, rows keeps what is done, run spreads the work over processes, results counts
and tests, paper holds the published numbers, figures and report write docs/reproduction.
"""
