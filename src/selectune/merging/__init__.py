"""What is kept afterwards? Merging what was trained into the base, and writing a model that needs nothing of Selectune."""
