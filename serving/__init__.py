"""Numpy, Redis and HTTP: the policy that decides, the weights it loads, the events it logs. No torch, no faust."""
