"""The factors that methods are made of: scores, granularities, allocations, searches; each written once."""
