"""What runs at an institution, simulated or real."""
