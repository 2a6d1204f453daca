"""The code that the result of a stage depends on, computed from the syntax trees instead of listed by hand.

A stage starts at its entries in `STAGES`. From there every name is followed to its definition in the package, through
imports in modules and functions. Comments, docstrings, type-only imports, the order of definitions and log messages do
not count. Annotations of functions do not count either, but they are followed, because methods are called on the values
that they describe. Code that no name leads to does not count: a module loaded by `importlib` must be in the table, with
`{name}` for its name.
"""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from lungddpm.core.progress import LOG

PACKAGE = Path(__file__).parents[1]
STAGES: dict[str, tuple[str, ...]] = {
    "simulate": ("lungddpm.sources.{name}:simulate",),
    # Dependencies of a source's header cache.
    "find_series": ("lungddpm.sources.{name}:find_series",),
    "index": (
        "lungddpm.sources.index:index_source",
        "lungddpm.sources.{name}:find_series",
        "lungddpm.arms.splits:assign_roles",
        "lungddpm.sources.index:write_index",
    ),
    "prepare": ("lungddpm.sources.{name}:load_scan", "lungddpm.layouts.compose:run_prepare"),
    "collect": ("lungddpm.layouts.collect:run_collect",),
    "qc": ("lungddpm.report.layout_pages:run_qc",),
    # Dependencies of the weights. Not `run_train`: it also monitors, saves and resumes.
    "train": (
        "lungddpm.models.data:open_cache",
        "lungddpm.models.training:initial_network",
        "lungddpm.generators.{name}:recipe",
        "lungddpm.models.optimization:Optimization",
    ),
    "synthesize": (
        "lungddpm.generators.{name}:LAYOUTS",
        "lungddpm.generators.{name}:load",
        "lungddpm.synthesis.plan:plan_samples",
        "lungddpm.synthesis.run:_Synthesis",
        "lungddpm.synthesis.run:_row",
    ),
    "import_external": ("lungddpm.synthesis.plan:samples_wanted", "lungddpm.synthesis.external:import_external"),
    # Dependencies of one sample besides its layout, and of a made layout.
    "draw": ("lungddpm.generators.{name}:load", "lungddpm.core.volume:write_volume"),
    "make_layout": (
        "lungddpm.layouts.placement:open_library",
        "lungddpm.layouts.placement:read_shapes",
        "lungddpm.layouts.placement:jitter",
        "lungddpm.layouts.placement:place",
    ),
    "copy_external": ("lungddpm.synthesis.external:import_external",),
    "compose": ("lungddpm.arms.compose:run_compose",),
    "compose_draw": ("lungddpm.arms.compose:run_compose_draw",),
    "plan": ("lungddpm.segmentation.nnunet:run_plan_segmenter",),
    # As for the denoiser: not `run_train_segmenter`.
    "train_segmenter": ("lungddpm.segmentation.trainers.lungddpm_trainer:LungDDPMTrainer",),
    "predict": ("lungddpm.segmentation.nnunet:run_predict",),
    "evaluate": ("lungddpm.evaluation.segmentation:run_evaluate",),
    "quality": ("lungddpm.quality.image_quality:run_quality",),
    "filter_samples": ("lungddpm.quality.sample_filter:run_filter",),
    "label_fidelity": ("lungddpm.quality.label_fidelity:run_label_fidelity",),
    "report": ("lungddpm.report.page:run_report",),
    "checksums": ("lungddpm.operations.verify:run_checksums",),
}
"""Where each stage starts: a module, or "module:definition". `{name}` is the source's or the generator's module."""
LEFT_OUT = {
    "lungddpm": "the version records the release, not the content of a file",
    "lungddpm.config": "only the values matter, and they are in each rule's `params.settings`",
    "lungddpm.core.code": "computing fingerprints does not change results",
    "lungddpm.core.device": "where something is computed, not what",
    "lungddpm.core.errors": "wording of errors",
    "lungddpm.core.files.atomic_path": "how a file is put in place, not its content",
    "lungddpm.core.files.exclusive_lock": "only waits",
    "lungddpm.core.files.lock_if_free": "only waits",
    "lungddpm.core.locks": "only waits",
    "lungddpm.core.memory": "where arrays are stored, not their content",
    "lungddpm.core.progress": "only prints",
    "lungddpm.core.torch_device": "where something is computed, not what",
    "lungddpm.models.checkpoint.patients_of": "reads metadata of the weights, whose hash counts",
    "lungddpm.models.accelerator": "where something is computed, and its precision if not set in config",
}
"""Modules, packages and definitions that do not affect results, and why."""

Definition = tuple[str, str]
"""Module and name."""


def stage_fingerprint(stage: str, name: str = "") -> str:
    """SHA-256 of the code that a stage's result depends on.

    Args:
        stage: a key of `STAGES`.
        name: replaces `{name}` in the entries, e.g. the kind of the source.

    Raises:
        LookupError: the package has no such module.
    """
    return _fingerprint(tuple(entry.format(name=name) for entry in STAGES[stage]))


@functools.cache
def _fingerprint(entries: tuple[str, ...]) -> str:
    return _own_code().fingerprint(entries)


@functools.cache
def _own_code() -> Code:
    return Code(PACKAGE, LEFT_OUT)


class CodeFromStep(TypedDict):
    """The code of a training from a step on; steps are counted from 1."""

    from_step: int
    code: str


def code_of_steps(
    before: Iterable[CodeFromStep], steps_taken: int, code: str, begin_again: str = ""
) -> list[CodeFromStep]:
    """Record which code runs which steps of a resumed training; log a warning if the code has changed.

    Args:
        before: the result when the training last ran; empty for a new one.
        steps_taken: where it resumes. Entries beyond it were never saved.
        code: fingerprint of the present code.
        begin_again: how to start over instead, as a clause for the warning.
    """
    held = [entry for entry in before if entry["from_step"] <= steps_taken]
    if held and held[-1]["code"] == code:
        return held
    if held:
        LOG.warning(
            "The code has changed since step %d (%.12s, now %.12s): the training continues, and its record lists both. "
            "To start over, %s.",
            steps_taken,
            held[-1]["code"],
            code,
            begin_again,
        )
    return [*held, {"from_step": steps_taken + 1, "code": code}]


class Code:
    """The code of a package on disk, as far as it affects results.

    Args:
        package: its folder.
        left_out: dotted names of packages, modules and definitions that do not count.
    """

    def __init__(self, package: Path, left_out: Iterable[str] = ()):
        self._package, self._left_out = package, frozenset(left_out)
        self._modules: dict[str, _Module | None] = {}

    def fingerprint(self, entries: Iterable[str]) -> str:
        """SHA-256 of all that `reached` finds.

        Raises:
            LookupError: an entry does not exist.
        """
        found = sorted(self._reach(entries).items())
        text = repr([[place, [statement.text for statement in statements]] for place, statements in found])
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

    def reached(self, entries: Iterable[str]) -> set[Definition]:
        """The definitions that the entries lead to; the import-time code of a module has the empty name.

        Raises:
            LookupError: an entry does not exist.
        """
        return set(self._reach(entries))

    def _reach(self, entries: Iterable[str]) -> dict[Definition, list[_Statement]]:
        found: dict[Definition, list[_Statement]] = {}
        left = [place for entry in entries for place in self._entry(entry)]
        seen = set()
        while left:
            place = left.pop()
            if place in seen or is_within(".".join(place), self._left_out):
                continue
            seen.add(place)
            name, definition = place
            # Importing a module runs its top-level code, and that of its parent packages.
            parts = name.split(".")
            left += [(".".join(parts[:size]), "") for size in range(1, len(parts) + 1)]
            if (module := self._module(name)) is None:  # a folder without __init__.py
                continue
            if definition in module.imported:
                left += self._places(module.imported[definition])
            if statements := module.statements(definition):
                found[place] = statements
                left += [place for statement in statements for name in statement.uses for place in self._places(name)]
        return found

    def _entry(self, entry: str) -> list[Definition]:
        name, _, definition = entry.partition(":")
        module = self._module(name)
        if module is None or (definition and definition not in module.names):
            raise LookupError(f"{entry}: is not in the package {self._package.name}")
        return [(name, definition)] if definition else module.places()

    def _places(self, dotted: str) -> list[Definition]:
        """The definition of a dotted name; if it is a module used as a value, everything in it."""
        parts = dotted.split(".")
        for size in range(len(parts), 0, -1):
            if (module := self._module(".".join(parts[:size]))) is not None:
                return module.places() if size == len(parts) else [(module.name, parts[size])]
        return []

    def _module(self, name: str) -> _Module | None:
        """A module of the package by its dotted name; None if there is none."""
        if name not in self._modules:
            first, *rest = name.split(".")
            stem = self._package.joinpath(*rest)
            files = [stem / "__init__.py", stem.with_name(f"{stem.name}.py")] if first == self._package.name else []
            path = next((path for path in files if path.is_file()), None)
            self._modules[name] = None if path is None else _Module(path, name, self._left_out)
        return self._modules[name]


def is_within(dotted: str, names: Iterable[str]) -> bool:
    """Whether a dotted name is one of these or inside one; the package itself only contains its own top level."""
    parts = dotted.split(".")
    within = {".".join(parts[:size]) for size in range(2, len(parts) + 1)}
    return not (within | ({parts[0]} if len(parts) <= 2 else set())).isdisjoint(names)


@dataclass(frozen=True)
class _Statement:
    """A statement at the top of a module.

    Attributes:
        text: its tree, the meaning of its names in other libraries, and hashes of the data files that it names.
        uses: dotted names of the package.
    """

    text: str
    uses: frozenset[str]


class _Module:
    """The top of a module.

    Attributes:
        imported: local name -> dotted name, from the package and from elsewhere.
        names: all names that it assigns.
        beside: contents of its folder, by name.
    """

    def __init__(self, path: Path, name: str, left_out: frozenset[str]):
        self.name, self.left_out = name, left_out
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        self.beside = {file.name: file for file in path.parent.iterdir()}
        body = ast.parse(path.read_bytes(), path).body
        self.imported = _imports_in(body, self.package)
        self.names = {"", *self.imported}
        self._nodes: dict[str, list[ast.stmt]] = {}
        for node in _counting(body):
            bound = _bound_in([node])
            self.names.update(bound)
            for local in bound if self._only_defines(node) else [""]:
                self._nodes.setdefault(local, []).append(node)
        self._read: dict[str, list[_Statement]] = {}

    def statements(self, name: str) -> list[_Statement]:
        """The statements that assign a name; under the empty name those that may have side effects."""
        if name not in self._read:
            self._read[name] = [_Reader(self).statement(node) for node in self._nodes.get(name, [])]
        return self._read[name]

    def places(self) -> list[Definition]:
        """Everything in it."""
        return [(self.name, name) for name in sorted(self.names)]

    def is_own(self, dotted: str) -> bool:
        """Whether a name is of the same package."""
        return dotted.partition(".")[0] == self.name.partition(".")[0]

    def _only_defines(self, statement: ast.stmt) -> bool:
        """Whether a statement counts only if the names that it assigns are used.

        A decorator of the package may also register what it decorates.
        """
        if isinstance(statement, (*_FUNCTIONS, ast.ClassDef)):
            chains = [_chain(d.func if isinstance(d, ast.Call) else d) for d in statement.decorator_list]
            origins = [self.imported.get(chain[0]) if chain else None for chain in chains]
            return all(origin is not None and not self.is_own(origin) for origin in origins)
        if isinstance(statement, ast.Assign):
            return all(isinstance(target, (ast.Name, ast.Tuple, ast.List)) for target in statement.targets)
        return isinstance(statement, (ast.AnnAssign, ast.AugAssign)) and isinstance(statement.target, ast.Name)


class _Reader:
    """Reads the tree of a top-level statement, without the parts that do not count.

    Attributes:
        uses: dotted names of the package that it uses.
        elsewhere: the meaning of its names in other libraries, and hashes of the data files that it names.
    """

    def __init__(self, module: _Module):
        self.module = module
        own = {name: f"{module.name}.{name}" for name in module.names}
        # Local name -> dotted name, from the module inwards; empty for a variable.
        self.scopes = [own | module.imported]
        self.uses: set[str] = set()
        self.elsewhere: set[str] = set()

    def statement(self, node: ast.stmt) -> _Statement:
        """The statement at the top of the module that this reader is for."""
        trees = self.trees([node])
        return _Statement(repr([trees, sorted(self.elsewhere)]), frozenset(self.uses))

    def trees(self, nodes: Iterable[Any]) -> list[Any]:
        """As `tree`, for those that count."""
        return [self.tree(node) for node in self._doing(nodes)]

    def _doing(self, nodes: Iterable[Any]) -> Iterator[Any]:
        """The nodes that count; a block that only reports progress is replaced by its contents."""
        for node in _counting(nodes):
            if isinstance(node, ast.With) and all(self._is_left_out(item) for item in node.items):
                yield from self._doing(node.body)
            elif not (isinstance(node, ast.Expr) and self._calls_left_out(node.value)):
                yield node

    def tree(self, node: Any) -> Any:
        """Nested lists of names and constants."""
        if isinstance(node, list):
            return self.trees(node)
        if isinstance(node, ast.Constant):
            self._take_data(node.value)
            return [node.value]
        if chain := _chain(node):
            self._use(chain)
            return chain
        if isinstance(node, (*_FUNCTIONS, ast.Lambda)):
            return self._function(node)
        if isinstance(node, _COMPREHENSIONS):
            return self._within(dict.fromkeys(_bound_in(g.target for g in node.generators), ""), node)
        if isinstance(node, ast.ClassDef):
            # Libraries read the annotations of a class, such as dataclasses.
            body = [self._fields(n) if isinstance(n, ast.AnnAssign) else self.tree(n) for n in _counting(node.body)]
            return [body, *self._fields(node, "body")]
        if isinstance(node, ast.AnnAssign):
            self._follow_types([node.annotation])
            return self.tree(ast.Assign([node.target], node.value)) if node.value is not None else []
        return self._fields(node) if isinstance(node, ast.AST) else node

    def _fields(self, node: ast.AST, without: str = "") -> list[Any]:
        fields = [(name, value) for name, value in ast.iter_fields(node) if name not in (*_NO_CODE, without)]
        # Python's versions differ in the fields that they have, but leave empty.
        fields = [(name, self.tree(value)) for name, value in fields if value is not None and value != []]
        return [type(node).__name__, *fields]

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> list[Any]:
        arguments, body = node.args, node.body if isinstance(node.body, list) else [node.body]
        outside: list[Any] = [self.trees(getattr(node, "decorator_list", [])), self.trees(arguments.defaults)]
        outside += [None if default is None else self.tree(default) for default in arguments.kw_defaults]
        kinds = (arguments.posonlyargs, arguments.args, [arguments.vararg], arguments.kwonlyargs, [arguments.kwarg])
        names = [[argument.arg for argument in kind if argument is not None] for kind in kinds]
        self._follow_types([a.annotation for kind in kinds for a in kind if a is not None])
        self._follow_types([getattr(node, "returns", None)])
        bound = {*_bound_in(body), *(name for kind in names for name in kind)}
        bound -= {name for inner in _statements_in(body) if isinstance(inner, ast.Global) for name in inner.names}
        scope = dict.fromkeys(bound, "") | _imports_in(body, self.module.package)
        return [type(node).__name__, getattr(node, "name", ""), names, outside, self._within(scope, body)]

    def _follow_types(self, annotations: Iterable[ast.expr | None]) -> None:
        """Treat names in annotations as used: methods are called on such values. Their text does not count."""
        elsewhere = set(self.elsewhere)
        for annotation in annotations:
            self.tree(annotation)
        self.elsewhere = elsewhere

    def _within(self, scope: dict[str, str], node: list[Any] | ast.AST) -> list[Any]:
        self.scopes.append(scope)
        tree = self.trees(node) if isinstance(node, list) else self._fields(node)
        self.scopes.pop()
        return tree

    def _meaning(self, name: str) -> str:
        """The dotted name behind a local one; empty for variables of a function and for built-ins."""
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), "")

    def _use(self, chain: list[str]) -> None:
        if meaning := self._meaning(chain[0]):
            if self.module.is_own(meaning):
                self.uses.add(".".join([meaning, *chain[1:]]))
            else:
                self.elsewhere.add(f"{chain[0]} = {meaning}")

    def _is_left_out(self, item: ast.withitem) -> bool:
        """Whether a block's manager decides nothing and has no name: `with waiting(...):`."""
        return item.optional_vars is None and self._calls_left_out(item.context_expr)

    def _calls_left_out(self, node: ast.expr) -> bool:
        """Whether it is a call of something that is left out, whose value is not used: `LOG.info(...)`."""
        if not isinstance(node, ast.Call):
            return False
        chain = _chain(node.func)
        meaning = self._meaning(chain[0]) if chain else ""
        return bool(meaning) and is_within(meaning, self.module.left_out)

    def _take_data(self, constant: object) -> None:
        """Hash a file next to the module, or everything in a folder, if this is its name."""
        path = self.module.beside.get(constant) if isinstance(constant, str) else None
        if path is not None:
            files = sorted(path.rglob("*")) if path.is_dir() else [path]
            for file in files:
                if file.is_file() and file.suffix not in (".py", ".pyc"):
                    digest = hashlib.sha256(file.read_bytes()).hexdigest()
                    self.elsewhere.add(f"{file.relative_to(path.parent).as_posix()} = {digest}")


_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_BLOCKS = (ast.stmt, ast.ExceptHandler, ast.match_case)
_NO_CODE = ("ctx", "kind", "type_comment", "lineno")


def _counting(nodes: Iterable[Any]) -> Iterator[Any]:
    """The nodes that compute something: no imports, docstrings or type-only statements."""
    for node in nodes:
        if isinstance(node, ast.If) and _chain(node.test)[-1:] == ["TYPE_CHECKING"]:
            yield from _counting(node.orelse)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield node


def _statements_in(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The statements of a scope, including those in blocks, without type-only ones."""
    for node in nodes:
        yield node
        if isinstance(node, ast.If) and _chain(node.test)[-1:] == ["TYPE_CHECKING"]:
            yield from _statements_in(node.orelse)
        elif not isinstance(node, (*_FUNCTIONS, ast.ClassDef, ast.Expr, ast.Assign, ast.Return)):
            yield from _statements_in(n for n in ast.iter_child_nodes(node) if isinstance(n, _BLOCKS))


def _imports_in(nodes: Iterable[ast.AST], package: str) -> dict[str, str]:
    """What the imports of a scope bind: local name -> dotted name."""
    found: dict[str, str] = {}
    for node in _statements_in(nodes):
        if isinstance(node, ast.Import):
            # `import a.b` binds `a`.
            names = [(alias.asname or alias.name).partition(".")[0] for alias in node.names]
            found |= {n: alias.name if alias.asname else n for n, alias in zip(names, node.names, strict=True)}
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = [*around, *([node.module] if node.module else [])]
            found |= {alias.asname or alias.name: ".".join([*origin, alias.name]) for alias in node.names}
    return found


def _bound_in(nodes: Iterable[ast.AST]) -> list[str]:
    """The names that nodes assign in their own scope, except imports."""
    found: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Name):
            found += [node.id] if isinstance(node.ctx, ast.Store) else []
        elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            found.append(node.name)
        elif not isinstance(node, (ast.Lambda, ast.Constant, ast.Attribute, *_COMPREHENSIONS)):
            if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
                found.append(node.name)
            found += _bound_in(ast.iter_child_nodes(node))
    return found


def _chain(node: Any) -> list[str]:
    """The parts of `a.b.c`; empty for anything else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (parts := _chain(node.value)):
        return [*parts, node.attr]
    return []
