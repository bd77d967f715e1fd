"""Completions in, one number each out: every function here makes a reward that TRL can call as it is."""
