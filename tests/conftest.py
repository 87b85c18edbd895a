"""What holds for all tests."""

from hypothesis import settings

# The machines are shared: how long one example takes says nothing.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
