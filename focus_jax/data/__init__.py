"""Images, conversations and the embedded data set, as NumPy arrays of static shape."""
