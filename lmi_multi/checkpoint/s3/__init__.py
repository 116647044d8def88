"""Checkpoints and artifacts on Amazon S3, or on what speaks its protocol.

`listing` says what is there and which of it a checkpoint needs, `download` brings it into the cache
over one of three transports (`ranges`: boto3; `crt`: the AWS Common Runtime; `s5cmd`: the command),
`parts` remembers what has come when a download is interrupted, and `upload` writes an artifact.
boto3 is imported when a client is made, not before.
"""
