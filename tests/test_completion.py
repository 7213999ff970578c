"""Shell completion, as done by a shell that has read the script."""

import shutil
import subprocess

import pytest

from metadyn.cli import main

COMPLETE = """
source "$1"; shift
function=$(complete -p metadyn | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
COMP_WORDS=(metadyn "$@") COMP_CWORD=$#
$function
echo "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """`completed("run", "")` returns the words that bash offers at the end of `metadyn run `."""
    if (bash := shutil.which("bash")) is None:
        pytest.skip("no bash")
    path = tmp_path_factory.mktemp("completion") / "metadyn"
    with pytest.MonkeyPatch.context() as patch, path.open("w") as file:
        patch.setattr("sys.stdout", file)
        assert main(["completion", "bash"]) == 0

    def complete(*words):
        command = [bash, "-c", COMPLETE, "bash", str(path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    return complete


def test_commands_studies_and_their_options_are_offered(completed):
    assert {"run", "figures", "view", "completion"} <= {*completed("")}
    assert completed("run", "contextual_b") == ["contextual_bandit"]
    assert completed("run", "linear_regression", "--domain.sig") == ["--domain.sigma"]
    assert completed("run", "contextual_bandit", "--domain.sig") == []
    assert completed("run", "linear_regression", "--pres") == ["--preset"]
    assert completed("view", "--s") == ["--serve"]


def test_an_unknown_shell_is_named_in_one_line(capsys):
    assert main(["completion", "tcl"]) == 2
    errors = capsys.readouterr().err
    assert len(errors.splitlines()) == 1
    assert "tcl" in errors
