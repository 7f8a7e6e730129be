"""Is the tuned policy better than its reference, at what, and what did it cost?"""
