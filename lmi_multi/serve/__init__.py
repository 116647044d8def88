"""The server: one model behind HTTP, configured as DJL Serving and SageMaker users do it."""
