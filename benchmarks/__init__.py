"""Measurements of lmi_multi beside what its users would run instead. See README.md."""
