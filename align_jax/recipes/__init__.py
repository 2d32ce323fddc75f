"""Runs made of runs: stages one after the other, and rounds of generating, comparing, refitting."""
