"""Processes that train one model together: who each is, how they meet, what ends them all if one is lost, and how they are started."""
