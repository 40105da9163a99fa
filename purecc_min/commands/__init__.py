"""What a user runs: __main__ calls one of these files for each command."""
