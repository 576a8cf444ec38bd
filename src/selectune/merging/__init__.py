"""What is kept afterwards? Weights that return to the base once training has ended, merging what was trained into the base, and writing a
model that needs nothing of Selectune."""
