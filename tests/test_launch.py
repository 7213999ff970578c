"""Launch files: those of Kubernetes keep to its schemas, those of Slurm retry what they should.

`kubernetes_schema.json` is the part of the definition of JobSet 0.12.0 (kubernetes-sigs/jobset,
v0.12.0, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml), which contains Job and Pod of
Kubernetes 1.36, for the fields in the launch files: types, values and required fields. It refuses
any other field, and lacks what only controllers check. It is made anew by

    python tests/test_launch.py jobset.x-k8s.io_jobsets.yaml > tests/kubernetes_schema.json
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

LAUNCH = Path(__file__).parent.parent / "experiments" / "launch"
SCHEMA = Path(__file__).parent / "kubernetes_schema.json"
KEPT = ("type", "enum", "required", "minimum", "maximum")


def job(name):
    """Returns the JobSet in a launch file; a Job is wrapped in one."""
    (content,) = yaml.safe_load_all((LAUNCH / name).read_text())
    if content["kind"] == "Job":
        assert content.pop("apiVersion") == "batch/v1"
        template = {"spec": content.pop("spec")}
        content |= {
            "kind": "JobSet",
            "spec": {"replicatedJobs": [{"name": "x", "template": template}]},
        }
    return content


def container(jobset):
    """Returns the spec of a JobSet's Job, and the Job's container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (job_container,) = spec["template"]["spec"]["containers"]
    return spec, job_container


def part(schema, values):
    """Returns a schema of Kubernetes, restricted to the fields of `values`, as a JSON Schema."""
    restricted = {name: schema[name] for name in KEPT if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        restricted["type"] = ["integer", "string"]
    if "items" in schema:
        restricted["items"] = part(schema["items"], [item for value in values for item in value])
    if "properties" in schema:
        present = {name: [v[name] for v in values if name in v] for name in schema["properties"]}
        fields = {name: part(schema["properties"][name], vs) for name, vs in present.items() if vs}
        restricted |= {"properties": fields, "additionalProperties": False}
    if "additionalProperties" in schema:
        entries = [entry for value in values for entry in value.values()]
        restricted["additionalProperties"] = part(schema["additionalProperties"], entries)
    return restricted


FILES = ("jobset.yaml", "indexed_job.yaml")


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_files_keep_to_its_published_schema(name):
    schema, jobset = json.loads(SCHEMA.read_text()), job(name)
    jsonschema.validate(jobset, schema)
    spec, job_container = container(jobset)
    for place, field, value in [
        (spec, "completion", 4),
        (spec, "completions", "4"),
        (job_container, "ports", [{"port": 1}]),
        (job_container["resources"]["limits"], "nvidia.com/gpu", [1]),
    ]:
        original = dict(place)
        place[field] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(jobset, schema)
        place.clear()
        place |= original
    del job_container["name"]
    with pytest.raises(jsonschema.ValidationError, match="'name' is a required property"):
        jsonschema.validate(jobset, schema)


def test_the_jobset_names_its_processes():
    jobset = job("jobset.yaml")
    spec, job_container = container(jobset)
    environment = {variable["name"]: variable.get("value") for variable in job_container["env"]}
    assert environment["JAX_NUM_PROCESSES"] == str(spec["parallelism"]) == str(spec["completions"])
    host = f"{jobset['metadata']['name']}-{jobset['spec']['replicatedJobs'][0]['name']}-0-0"
    address = f"{host}.{jobset['metadata']['name']}:{job_container['ports'][0]['containerPort']}"
    assert environment["JAX_COORDINATOR_ADDRESS"] == address
    assert job_container["args"][:2] == ["run", "experiments/linear_regression.py"]


def fake(folder, name, code):
    """Makes a command that records its arguments and exits with `code`."""
    (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/called\nexit {code}\n')
    (folder / name).chmod(0o755)


def calls(folder, fake, **environment):
    """Returns the calls that a launcher's command makes, and its exit code."""
    path = f"{folder}:{os.environ['PATH']}"
    completed = subprocess.run(fake, env=os.environ | environment | {"PATH": path}, check=False)
    lines = (folder / "called").read_text().splitlines()
    (folder / "called").unlink()
    return lines, completed.returncode


def test_each_pod_of_the_indexed_job_runs_its_part_of_the_sweep(tmp_path):
    spec, job_container = container(job("indexed_job.yaml"))
    fake(tmp_path, "metadyn", 0)
    for i in range(spec["completions"]):
        run = [*job_container["command"], *job_container["args"]]
        (line,), _ = calls(tmp_path, run, JOB_COMPLETION_INDEX=str(i))
        assert line.startswith("metadyn sweep experiments/linear_regression.py --outer.")
        assert line.endswith(f"--out runs/sweep --part {i + 1}/{spec['completions']}")


@pytest.mark.parametrize(
    ("file", "runs"),
    [
        ("slurm.sh", "--kill-on-bad-exit=1 metadyn run tiny --seed 3"),
        ("slurm_array.sh", "metadyn sweep tiny --seed 3 --part 2/4"),
    ],
)
@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),
        (130, 3, True),
        (137, 19, True),
        (134, 20, False),
    ],
)
def test_slurm_files_requeue_only_interrupted_jobs(file, runs, code, restarts, requeued, tmp_path):
    fake(tmp_path, "srun", code)
    fake(tmp_path, "scontrol", 0)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "SLURM_RESTART_COUNT": str(restarts)}
    slurm |= {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    launch = ["bash", LAUNCH / file, "tiny", "--seed", "3"]
    requeue = ["scontrol requeue 7"] if requeued else []
    assert calls(tmp_path, launch, **slurm) == ([f"srun --cpus-per-task=8 {runs}", *requeue], code)


if __name__ == "__main__":
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())
    (version,) = definition["spec"]["versions"]
    published = part(version["schema"]["openAPIV3Schema"], [job(name) for name in FILES])
    print(json.dumps(published, indent=1))
