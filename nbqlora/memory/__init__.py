"""Memory of the card and of the machine: what is there, and how high it went."""
