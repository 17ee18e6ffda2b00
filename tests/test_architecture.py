"""The arrows of docs/architecture.md: who may import whom."""

from __future__ import annotations

import grimp
import pytest

from morphtrain import schema

GROUPS = sorted(set(schema.OPTIONS) - {"timing"})
COMMANDS = {"run", "maxbatch", "export", "compare", "sweep", "trainer", "options"}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """All imports, those inside functions too, but none that only the type checker sees."""
    return grimp.build_graph(
        "morphtrain", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )


def rooms(graph: grimp.ImportGraph, room: str) -> set[str]:
    """What the modules of a room, a package or module directly in `morphtrain`, import of other rooms."""
    name = f"morphtrain.{room}"
    inside = {module for module in graph.modules if module == name or module.startswith(f"{name}.")}
    assert inside, name
    imported = {target for module in inside for target in graph.find_modules_directly_imported_by(module)}
    return {target.split(".")[1] for target in imported - inside if target.startswith("morphtrain.")}


def test_no_module_imports_what_imports_it(graph: grimp.ImportGraph) -> None:
    circles = [
        (module, imported)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if graph.chain_exists(importer=imported, imported=module)
    ]
    assert circles == []


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_imports_neither_the_trainer_nor_another_group(group: str, graph: grimp.ImportGraph) -> None:
    assert not rooms(graph, group) & (COMMANDS | set(GROUPS) - {group})


def test_the_state_of_a_run_stands_below_what_changes_it(graph: grimp.ImportGraph) -> None:
    for room in ("state", "method", "contracts", "tracker", "world", "host"):
        assert not rooms(graph, room) & (COMMANDS | set(GROUPS) | {"evidence"}), room


def test_morph_and_cost_know_no_training_loop(graph: grimp.ImportGraph) -> None:
    assert rooms(graph, "morph") == {"errors", "plain_data"}
    assert rooms(graph, "cost") <= {"errors", "files", "layer_calls", "morph", "plain_data", "timing", "world"}


def test_evidence_reads_records_and_never_the_trainer(graph: grimp.ImportGraph) -> None:
    assert rooms(graph, "evidence") <= {"errors", "files", "flags", "plain_data", "tracking", "wording"}


@pytest.mark.parametrize(
    ("package", "room"),
    [("mlflow", "tracking"), ("tensorboard", "tracking"), ("wandb", "tracking"), ("statsmodels", "evidence")],
)
def test_a_heavy_package_is_imported_in_one_room(package: str, room: str, graph: grimp.ImportGraph) -> None:
    importers = graph.find_modules_that_directly_import(package)
    assert importers
    assert all(module.split(".")[1] == room for module in importers)


def test_the_report_reads_what_evidence_finds(graph: grimp.ImportGraph) -> None:
    assert rooms(graph, "report") <= {"errors", "evidence", "files", "flags", "schema", "wording"}


@pytest.mark.parametrize("room", ["schema", "sweep", "tracking", "evidence", "report"])
def test_what_starts_a_run_or_reports_it_waits_for_no_torch(room: str, graph: grimp.ImportGraph) -> None:
    assert not graph.chain_exists(importer=f"morphtrain.{room}", imported="torch", as_packages=True)
