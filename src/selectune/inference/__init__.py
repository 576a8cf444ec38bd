"""What acts when a specialist answers.

Knows: which of several specialists a prompt should go to. Does not know: how they were trained.
"""
