"""The official scorers' rules, quirks included: plain functions of texts."""
