"""What everything else stands on: digests, files, the store, processes, local servers."""
