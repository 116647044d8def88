# ruff: noqa: E402
# %% [markdown]
# # From the Hub to an endpoint on SageMaker, and away again
#
# A model is downloaded, converted, tried here, uploaded to S3, deployed, asked, and removed. What
# costs money is removed at the end, also when a step fails: at the latest when Python ends.
#
# Before this: `pip install 'lmi_multi[serve]'`; credentials and a region of AWS; a bucket; a role
# for the endpoint; an image in a registry of yours (`docs/deploying.md` tells of these). Then set
# the variables below, or edit them here.

# %%
import atexit
import json
import os
import tempfile
from contextlib import ExitStack

model_id = os.environ.get("MODEL", "google/flan-t5-base")
bucket = os.environ["BUCKET"]
image = os.environ["IMAGE"]
role = os.environ["ROLE"]
instance = os.environ.get("INSTANCE", "ml.g5.xlarge")
prompt = os.environ.get("PROMPT", "translate English to German: Good morning.")

clean_up = ExitStack()
atexit.register(clean_up.close)
work = clean_up.enter_context(tempfile.TemporaryDirectory())

# %% [markdown]
# ## Download
#
# `HF_TOKEN` is for gated models, `HF_ENDPOINT` for another Hub.

# %%
from huggingface_hub import snapshot_download

folder = snapshot_download(model_id, allow_patterns=["*.json", "*.safetensors", "*.model"])

# %% [markdown]
# ## Convert
#
# Once, so that no container has to: one file of weights a rank, and a manifest with their hashes.

# %%
from lmi_multi.checkpoint.convert import convert

artifact = convert(folder, f"{work}/artifact", dtype="bf16")
print(artifact.spec.family, artifact.dtype)

# %% [markdown]
# ## Try it here

# %%
import lmi_multi

with lmi_multi.load(artifact.folder) as model:
    [expected] = model.generate(prompt, max_new_tokens=30)
print(expected.text)

# %% [markdown]
# ## Upload
#
# All that goes by this name is removed in the end: it is one that nobody else has.

# %%
from uuid import uuid4

import boto3

from lmi_multi.checkpoint.publish import publish
from lmi_multi.deploy.deployment import name_for

name = f"{name_for(model_id)[:50]}-{uuid4().hex[:8]}"
objects = boto3.resource("s3").Bucket(bucket).objects.filter(Prefix=f"{name}/")
clean_up.callback(objects.delete)
publish(artifact.folder, f"s3://{bucket}/{name}")

# %% [markdown]
# ## Deploy
#
# First what will be asked of AWS; the model is compared with the instance on the way. Then the
# calls, which take minutes.

# %%
from lmi_multi.deploy.prepare import prepare

deployment, fit = prepare(
    f"s3://{bucket}/{name}",
    instance,
    settings={},
    environment={},
    name=name,
    image=image,
    role=role,
)
print(json.dumps([call.shown() for call in deployment.calls()], indent=2))

# %%
from lmi_multi.deploy.endpoint import create, remove

clean_up.callback(remove, name, tell=print, status=print)
create(deployment, tell=print, status=print)

# %% [markdown]
# ## Ask

# %%
from lmi_multi.deploy.invoke import invoke, stream

answer = invoke(name, {"inputs": [prompt], "parameters": {"max_new_tokens": 30}})
print(answer[0]["generated_text"])

# %%
for event in stream(name, {"inputs": prompt, "parameters": {"max_new_tokens": 30}}):
    print(event["token"]["text"], end="", flush=True)
print()

# %% [markdown]
# ## Clean up

# %%
clean_up.close()
