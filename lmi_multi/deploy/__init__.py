"""Endpoints on SageMaker: made, asked, removed."""
