from pathlib import Path

import pytest

from hpc_closure.experiment import folder
from hpc_closure.experiment.folder import STAGES, Run
from hpc_closure.work.units import Unit


def test_all_paths_lie_in_the_run_folder(tmp_path):
    run = Run(tmp_path / "mine")
    unit = Unit(0, (60, 61, 62))
    paths = [
        run.config,
        run.provenance,
        run.model,
        run.checkpoints,
        run.metrics,
        run.tensorboard,
        run.scores_csv,
        run.scores_json,
        run.figures,
        run.report,
        run.units_dir,
    ]
    for stage in STAGES:
        paths += [
            run.folder(stage),
            run.log(stage),
            run.log(stage, unit),
            run.product(stage, unit),
            run.claim(stage, unit),
            run.error(stage, unit),
            run.restart(stage, unit),
            run.restart(stage, unit, 7),
            run.manifest(stage),
        ]
    assert all(path.is_relative_to(run.root) for path in paths)
    assert len(set(paths)) == len(paths)
    assert not run.root.exists()


def test_names_of_blocks(tmp_path):
    run = Run(tmp_path)
    assert run.product("generate", Unit(3, (60, 61))).name == "block_000060-000061.h5"
    assert run.product("rollout", "000000-000001").parent.name == "rollout"
    assert run.data == run.folder("generate")


def test_root_is_absolute():
    assert Run("x").root == Path.cwd() / "x"
    assert "~" not in str(Run("~/x"))


def test_unknown_stage(tmp_path):
    with pytest.raises(ValueError, match="'trian' is none of generate, pilot, replicas, train"):
        Run(tmp_path).folder("trian")


def test_names_of_units_and_back():
    assert folder.unit_name(60, 79) == "000060-000079"
    assert folder.members_of_unit("000060-000079") == (60, 79)
    assert folder.members_of_unit(folder.unit_name(5, 12_345_678)) == (5, 12_345_678)
    for name in ("60-79", "000060-000079.claim", "000060_000079"):
        with pytest.raises(ValueError, match="expected FIRST-LAST with six digits each"):
            folder.members_of_unit(name)
