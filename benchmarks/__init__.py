"""Measurements that anyone can repeat: each writes JSON, a figure and a reading of them."""
