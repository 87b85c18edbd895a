"""Programs of other libraries to compare with; they run in an environment of their own."""
