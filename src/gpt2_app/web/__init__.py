"""The Write With Transformer page: a server that shares models between requests, and what it serves."""
