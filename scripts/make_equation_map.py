"""Writes the table of docs/equations.md: every equation, the lines that implement it, the tests of it.

    python -m scripts.make_equation_map

A line of code carries the tag of its equation in a comment, `# ADD eq. 4`; a test carries it in a decorator,
@pytest.mark.equation("ADD eq. 4"). A test of the repository checks that the table is up to date."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "equations.md"
SOURCES = ["sampler.py", "losses.py", "discriminator.py", "adt.py", "add.py"]
TAG_RE = re.compile(r"\b(ADT (?:path|start|constraint|similarity|comparison|L_diff|L_G|L_D)|ADD eq\. \d)\b")
MEANING = {
    "ADT path": "x_t' = α_t' x̂0 + σ_t' ε̂: one step of the sampling path",
    "ADT start": "t_s uniform over the path, x_ts = α x0 + σ ε: image-to-image; tuned: pure noise",
    "ADT constraint": "the network is called on sg[x_t], and K steps keep their graph",
    "ADT similarity": "D(x, y) of the siamese kinds; ordered: ⟨g_k(x), h_k(y)⟩ − ⟨g_k(y), h_k(x)⟩",
    "ADT comparison": "D(x, y) = d(y | c) − d(x | c): relativistic",
    "ADT L_diff": "‖y_θ(x_t, t, c) − (a x0 + b ε)‖²",
    "ADT L_G": "L_diff + λ · (−D(x0, x̂0))",
    "ADT L_D": "relu(1 − D(sg[x̂0], x0)) + relu(1 + D(x0, sg[x̂0])); relu(1 − D(x0, x0′)) first, if D is not "
               "antisymmetric",
    "ADD eq. 1": "L = L_adv + λ L_distill",
    "ADD eq. 2": "L_adv^G = −E[Σ_k D_k(F_k(x̂))]",
    "ADD eq. 3": "hinge loss of the discriminator (tuned: relativistic) + γ R1 on the inputs of the heads",
    "ADD eq. 4": "c(t) ‖x̂ − x̂_ψ(sg[x̂_t]; t)‖²: score distillation",
}


def tagged_lines(source):
    """{line number: tags in its comment} of a Python source text."""
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        tags = TAG_RE.findall(token.string) if token.type == tokenize.COMMENT else []
        if tags:
            lines[token.start[0]] = tags
    return lines


def functions_by_line(source):
    """{line number: qualified name of the function or class around it} of a Python source text."""
    names = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}" if prefix else child.name
                names.update(dict.fromkeys(range(child.lineno, child.end_lineno + 1), name))
            visit(child, name)

    visit(ast.parse(source), "")
    return names


def tags():
    """{tag: [(file, line number, function)]}, read from the comments of SOURCES."""
    places = {}
    for name in SOURCES:
        source = (ROOT / name).read_text()
        functions = functions_by_line(source)
        for line, line_tags in tagged_lines(source).items():
            for tag in line_tags:
                places.setdefault(tag, []).append((name, line, functions.get(line, "module")))
    return places


def proofs():
    """{tag: ["FILE::FUNCTION"]}, read from the decorators of the tests."""
    tests = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.equation":
                    tests.setdefault(decorator.args[0].value, []).append(f"{path.name}::{node.name}")
    return tests


def table():
    """The table in Markdown; links are relative to docs/."""
    places, tests = tags(), proofs()
    lines = ["| equation | meaning | code | tests |", "|---|---|---|---|"]
    for tag, meaning in MEANING.items():
        if tag not in places:
            continue
        code = ", ".join(f"[{Path(name).stem}.{function}](../{name}#L{line})"
                         for name, line, function in places[tag])
        test_links = []
        for test in tests.get(tag, []):
            file_name, function = test.split("::")
            label = function.removeprefix("test_").replace("_", " ")
            test_links.append(f"[{label}](../tests/{file_name})")
        lines.append(f"| {tag} | {meaning.replace('|', '¦')} | {code} | {'<br>'.join(test_links)} |")
    return "\n".join(lines)


def main():
    text = PAGE.read_text()
    before, marker, rest = text.partition("<!-- equations -->")
    _, end, after = rest.partition("<!-- end -->")
    if not marker or not end:
        raise SystemExit(f"{PAGE}: wanted the lines <!-- equations --> and <!-- end -->")
    PAGE.write_text(f"{before}{marker}\n{table()}\n{end}{after}")
    print(table())


if __name__ == "__main__":
    main()
