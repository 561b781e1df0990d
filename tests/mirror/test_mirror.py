"""The two framework packages have the same files and the same public names. What differs stands here, with a reason.

The comparison begins to act when `src/gpt2_tf` exists; what can be said about one package alone is tested until then.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent.parent / "src"
PT, TF = SOURCE / "gpt2_pt", SOURCE / "gpt2_tf"

#: Files that stand in one package only -> why.
FILES_OF_ONE: dict[str, str] = {
    "_start": "Keras has several backends and TensorFlow a banner; PyTorch needs no preparation",
    "layers": "what torch.nn and torch.nn.functional have: norm, dropout, sizes known and unknown while tracing",
    "callbacks": "what Keras's fit calls between epochs; PyTorch has no such door",
    "fitting": "Keras's compile, fit, evaluate and predict; PyTorch has no such door",
    "text": "strings are tensors in TensorFlow, and there alone",
    "text_graph": "what `text` is made of: the tokenizer in TensorFlow's own operations",
    "products": "PyTorch asks MKL where oneDNN is the faster one; TensorFlow has one library",
    "exporting": "SavedModel is TensorFlow's; PyTorch's own torch.export takes our models as they are",
}

#: Arguments that TensorFlow's functions take besides -> why.
ARGUMENTS_OF_TF: dict[str, str] = {
    "training": "Keras's word for what PyTorch keeps in the modules",
    "seed": "dropout drawn from a seed, so that a recomputed block is the same block",
    "seeds": "the same, for the places of dropout of a block",
    "kwargs": "Keras's own, dtype and name",
}

#: Arguments that PyTorch's functions (not the methods of its classes) take besides -> why.
ARGUMENTS_OF_PT: dict[str, str] = {
    "device": "TensorFlow places tensors itself",
}

#: Public names, "file.name" or "file.class.name", that stand in one package only -> why.
NAMES_OF_ONE: dict[str, str] = {
    "attention.Conv1D.extra_repr": "what torch.nn.Module prints",
    "model.check_tensors": "in TensorFlow arrays and lists of numbers are taken as well",
    "weights.PreTrainedModel.device": "TensorFlow places variables itself",
    "weights.PreTrainedModel.dtype": "a property of every Keras layer",
    "weights.PreTrainedModel.get_parameter": "a method of every torch.nn.Module",
    "weights.PreTrainedModel.get_config": "what Keras's own files say of a model",
    "weights.PreTrainedModel.from_config": "the way back from there",
    "weights.PreTrainedModel.save": "Keras's own, which refuses while an adapter is held",
    "weights.PreTrainedModel.save_weights": "the same",
    "weights.PreTrainedModel.save_own_variables": "the same",
    "weights.PreTrainedModel.variables": "what Keras's fit trains, with an adapter's variables among them",
    "weights.PreTrainedModel.weights": "the same",
    "weights.inputs_together": "Keras users pass a dict or a list as the first argument",
    "weights.Linear.reset_parameters": "torch.nn.Linear draws values that would be thrown away",
    "weights.Linear.__init__": "Keras has no layer with a kernel of (out, in)",
    "compiled.Graphs": "CUDA graphs are recorded in PyTorch alone",
    "compiled.Graph": "the same",
    "compiled.NativeEngine": "in PyTorch a cache is written in place anyway, and one engine serves both steps",
    "weights.registered": "makes a class known to Keras's own files",
}


def twin(name: str) -> str:
    """The name that a public class of PyTorch has in TensorFlow: GPT2Model -> TFGPT2Model."""
    return f"TF{name}" if name.startswith("GPT2") and name not in ("GPT2Config", "GPT2Tokenizer") else name


def public(name: str) -> bool:
    return not name.startswith("_")


def defined(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The public names that a body of statements defines."""
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return {name: node for name, node in found.items() if public(name) or name == "__init__"}


def names(file: Path) -> dict[str, ast.stmt]:
    """Every public name of a file, methods of public classes as "Class.method"."""
    found = defined(ast.parse(file.read_text(encoding="utf-8")).body)
    for name, node in list(found.items()):
        if isinstance(node, ast.ClassDef):
            found |= {f"{name}.{inner}": child for inner, child in defined(node.body).items()}
    return found


def arguments(node: ast.stmt) -> list[str] | None:
    if not isinstance(node, ast.FunctionDef):
        return None
    given = node.args
    return [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


def pairs() -> list[tuple[str, Path, Path]]:
    if not TF.exists():
        return []
    return [(file.stem, file, TF / file.name) for file in sorted(PT.glob("*.py")) if file.stem not in FILES_OF_ONE]


def as_twin(name: str) -> str:
    return ".".join("call" if part == "forward" else twin(part) for part in name.split("."))


def is_excused(stem, name):
    """Whether the name, or the class that it belongs to, stands in one package only."""
    return any(f"{stem}.{name}.".startswith(f"{full}.") for full in NAMES_OF_ONE)


needs_both = pytest.mark.skipif(not TF.exists(), reason="there is no src/gpt2_tf yet")


@needs_both
def test_both_packages_have_the_same_files():
    of_pt, of_tf = ({file.stem for file in folder.glob("*.py")} for folder in (PT, TF))
    assert of_pt ^ of_tf == set(FILES_OF_ONE)


@needs_both
@pytest.mark.parametrize(("stem", "one", "other"), pairs(), ids=lambda value: value if isinstance(value, str) else "")
def test_both_files_have_the_same_public_names(stem, one, other):
    of_pt = {as_twin(name) for name in names(one) if not is_excused(stem, name)}
    of_tf = {name for name in names(other) if not is_excused(stem, name)}
    assert of_pt == of_tf


@needs_both
@pytest.mark.parametrize(("stem", "one", "other"), pairs(), ids=lambda value: value if isinstance(value, str) else "")
def test_public_functions_take_the_same_arguments_in_the_same_order(stem, one, other):
    of_tf = names(other)
    for name, node in names(one).items():
        if is_excused(stem, name) or arguments(node) is None or name.endswith("__init__"):
            continue
        here, there = arguments(node) or [], arguments(of_tf[as_twin(name)]) or []
        of_pt = [each for each in here if "." in name or each not in ARGUMENTS_OF_PT]
        of_twin = [each for each in there if each in here or each not in ARGUMENTS_OF_TF]
        assert of_twin == of_pt, name


def test_every_exception_names_something_that_exists():
    for file in FILES_OF_ONE:
        assert (PT / f"{file}.py").exists() or (TF / f"{file}.py").exists(), file
    for full in NAMES_OF_ONE:
        stem, _, name = full.partition(".")
        there = [folder / f"{stem}.py" for folder in (PT, TF) if (folder / f"{stem}.py").exists()]
        assert sum(name in names(file) for file in there) == 1, full


@pytest.mark.parametrize("package", ["gpt2_pt", "gpt2_tf"])
def test_the_package_exports_what_it_promises(package):
    pytest.importorskip({"gpt2_pt": "torch", "gpt2_tf": "keras"}[package])
    import gpt2_core

    promised = {
        "GPT2Model",
        "GPT2LMHeadModel",
        "GPT2DoubleHeadsModel",
        "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification",
        "GPT2ForQuestionAnswering",
        "GPT2Config",
        "GPT2Tokenizer",
        "GenerationConfig",
    }
    if package == "gpt2_tf":
        promised = {twin(name) for name in promised}
    module = importlib.import_module(package)
    assert promised <= set(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    assert module.GPT2Config is gpt2_core.GPT2Config
    assert module.GPT2Tokenizer is gpt2_core.GPT2Tokenizer
    assert module.__version__ == gpt2_core.__version__


FORWARD = [
    "self", "input_ids", "past", "attention_mask", "token_type_ids", "position_ids", "head_mask", "inputs_embeds",
]  # fmt: skip
LABELS = {
    "GPT2Model": [],
    "GPT2LMHeadModel": ["labels"],
    "GPT2DoubleHeadsModel": ["mc_token_ids", "labels", "mc_labels"],
    "GPT2ForSequenceClassification": ["labels"],
    "GPT2ForTokenClassification": ["labels"],
    "GPT2ForQuestionAnswering": ["start_positions", "end_positions"],
}


@pytest.mark.parametrize("model", LABELS)
@pytest.mark.parametrize("package", [PT, TF], ids=lambda package: package.name)
def test_every_forward_takes_the_documented_arguments_in_the_documented_order(package, model):
    found = names(package / "model.py") | names(package / "heads.py")
    full = f"{model}.forward" if package == PT else f"{twin(model)}.call"
    taken = [name for name in arguments(found[full]) or [] if name != "training"]
    flags = ["use_cache", "output_attentions", "output_hidden_states"]
    named = ["lm_labels"] if model == "GPT2DoubleHeadsModel" else []
    assert taken == [*FORWARD, *LABELS[model], *flags, *named, "past_key_values"]
