"""A pod before it is rented: what the compiled program does on one of its devices."""
