"""The search without a cluster: what prunes a trial, which mask is chosen, and the tables that show it.

Everything here works on the plain contents of trial.json, search.json and outcome.json, and needs neither Ray nor a
model.
"""
