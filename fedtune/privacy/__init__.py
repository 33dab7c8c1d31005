"""What keeps clients' data to themselves beyond sending adapters only."""
