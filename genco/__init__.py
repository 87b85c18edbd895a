"""The front door: command line, demo, local services, simulated shoppers. Nothing imports this package."""
