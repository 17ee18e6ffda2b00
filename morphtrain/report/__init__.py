"""The report: every experiment's answer, with what it rests on, as one HTML file and tables as CSV."""
