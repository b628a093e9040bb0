"""Rows become numbers: comparisons, intervals, published figures beside them."""
