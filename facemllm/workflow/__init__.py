"""The steps as one list, the one way a step is run, and run folders."""
