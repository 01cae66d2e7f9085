"""Checks for a user's own configuration: does a run that was hit go on as if nothing had been?"""
