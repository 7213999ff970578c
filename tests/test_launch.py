"""The launch files: Kubernetes' keep to its published schemas, Slurm's try again when they should.

`kubernetes_schema.json` is what the definition of JobSet 0.12.0 (kubernetes-sigs/jobset, v0.12.0,
config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml), which holds that of Kubernetes 1.36's Job
and Pod, says of the fields that the launch files have: types, values, what is required. Any other
field is refused. What controllers check beyond it is not. It is made anew by

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
    """What a launch file holds: a JobSet, or a Job as part of one."""
    (found,) = yaml.safe_load_all((LAUNCH / name).read_text())
    if found["kind"] == "Job":
        assert found.pop("apiVersion") == "batch/v1"
        template = {"spec": found.pop("spec")}
        found |= {
            "kind": "JobSet",
            "spec": {"replicatedJobs": [{"name": "x", "template": template}]},
        }
    return found


def container(found):
    """The spec of its Job, and that Job's container."""
    (replicated,) = found["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (only,) = spec["template"]["spec"]["containers"]
    return spec, only


def part(schema, values):
    """What a schema of Kubernetes says of these values, as a JSON Schema."""
    found = {name: schema[name] for name in KEPT if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if "items" in schema:
        found["items"] = part(schema["items"], [each for value in values for each in value])
    if "properties" in schema:
        given = {name: [v[name] for v in values if name in v] for name in schema["properties"]}
        fields = {name: part(schema["properties"][name], of) for name, of in given.items() if of}
        found |= {"properties": fields, "additionalProperties": False}
    if "additionalProperties" in schema:
        each = [each for value in values for each in value.values()]
        found["additionalProperties"] = part(schema["additionalProperties"], each)
    return found


FILES = ("jobset.yaml", "indexed_job.yaml")


@pytest.mark.parametrize("name", FILES)
def test_kubernetes_files_keep_to_its_published_schema(name):
    schema, found = json.loads(SCHEMA.read_text()), job(name)
    jsonschema.validate(found, schema)
    spec, only = container(found)
    for place, field, value in [
        (spec, "completion", 4),
        (spec, "completions", "4"),
        (only, "ports", [{"port": 1}]),
        (only["resources"]["limits"], "nvidia.com/gpu", [1]),
    ]:
        kept = dict(place)
        place[field] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(found, schema)
        place.clear()
        place |= kept
    del only["name"]
    with pytest.raises(jsonschema.ValidationError, match="'name' is a required property"):
        jsonschema.validate(found, schema)


def test_the_jobset_names_its_processes():
    found = job("jobset.yaml")
    spec, only = container(found)
    told = {each["name"]: each.get("value") for each in only["env"]}
    assert told["JAX_NUM_PROCESSES"] == str(spec["parallelism"]) == str(spec["completions"])
    host = f"{found['metadata']['name']}-{found['spec']['replicatedJobs'][0]['name']}-0-0"
    address = f"{host}.{found['metadata']['name']}:{only['ports'][0]['containerPort']}"
    assert told["JAX_COORDINATOR_ADDRESS"] == address
    assert only["args"][:2] == ["run", "experiments/linear_regression.py"]


def command(folder, name, code):
    """A command that writes its arguments down and exits."""
    (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {folder}/called\nexit {code}\n')
    (folder / name).chmod(0o755)


def called(folder, command, **environment):
    """What a launcher's command calls, and its exit code."""
    path = f"{folder}:{os.environ['PATH']}"
    done = subprocess.run(command, env=os.environ | environment | {"PATH": path}, check=False)
    lines = (folder / "called").read_text().splitlines()
    (folder / "called").unlink()
    return lines, done.returncode


def test_each_pod_of_the_indexed_job_does_its_part_of_the_sweep(tmp_path):
    spec, only = container(job("indexed_job.yaml"))
    command(tmp_path, "metadyn", 0)
    for i in range(spec["completions"]):
        run = [*only["command"], *only["args"]]
        (line,), _ = called(tmp_path, run, JOB_COMPLETION_INDEX=str(i))
        assert line.startswith("metadyn sweep experiments/linear_regression.py --outer.")
        assert line.endswith(f"--out runs/sweep --part {i + 1}/{spec['completions']}")


@pytest.mark.parametrize(
    ("file", "does"),
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
def test_slurm_files_try_again_what_was_interrupted(file, does, code, restarts, requeued, tmp_path):
    command(tmp_path, "srun", code)
    command(tmp_path, "scontrol", 0)
    told = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "SLURM_RESTART_COUNT": str(restarts)}
    told |= {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "4"}
    asked = ["bash", LAUNCH / file, "tiny", "--seed", "3"]
    again = ["scontrol requeue 7"] if requeued else []
    assert called(tmp_path, asked, **told) == ([f"srun --cpus-per-task=8 {does}", *again], code)


if __name__ == "__main__":
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())
    (version,) = definition["spec"]["versions"]
    published = part(version["schema"]["openAPIV3Schema"], [job(name) for name in FILES])
    print(json.dumps(published, indent=1))
