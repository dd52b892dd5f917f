"""Runs as one page that opens offline: `python -m trainer.report`."""
