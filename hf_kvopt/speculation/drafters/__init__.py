"""What proposes tokens without trained heads."""
