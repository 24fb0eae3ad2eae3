"""The report: one page of figures and tables about any number of runs."""
