"""The equation map: every tag in the source, the line that carries it, the tests that prove it.

`python tests/equations.py` prints the README's table and rewrites it there;
a test checks that it is up to date."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ["sampler.py", "losses.py", "discriminator.py", "adt.py", "add.py"]
TAG = re.compile(r"\b(ADT (?:path|start|constraint|similarity|comparison|L_diff|L_G|L_D)|ADD eq\. \d)\b")
MEANING = {
    "ADT path": "x_t' = α_t' x̂0 + σ_t' ε̂: one step of the inference path",
    "ADT start": "t_s uniform over the path, x_ts = α x0 + σ ε: image-to-image; pure noise by default",
    "ADT constraint": "network called on sg[x_t], graph kept at K steps only",
    "ADT similarity": "D(x, y) from cos(h_i(F_i x), h_i(F_i y)); the default for large models",
    "ADT comparison": "D(x, y) = v(y | c) − v(x | c): one critic's two verdicts; the default here",
    "ADT L_diff": "‖y_θ(x_t, t, c) − (a x0 + b ε)‖²",
    "ADT L_G": "L_diff + λ · (−D(x0, x̂0))",
    "ADT L_D": "relu(1 − D(x0, x0′)) + relu(1 + D(x0, sg[x̂0]))",
    "ADD eq. 1": "L = L_adv + λ L_distill",
    "ADD eq. 2": "L_adv^G = −E[Σ_k D_k(F_k(x̂))]; here the mean over k",
    "ADD eq. 3": "hinge of the discriminator (of the difference, by default) + γ R1 on the heads' inputs",
    "ADD eq. 4": "c(t) ‖x̂ − x̂_ψ(sg[x̂_t]; t)‖²: score distillation",
}


def tags():
    """{tag: ['file:line', …]}, read from comments only."""
    found = {}
    for name in SOURCES:
        if not (ROOT / name).exists():
            continue
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            if "  # " in line:
                for tag in TAG.findall(line.split("  # ", 1)[1]):
                    found.setdefault(tag, []).append(f"{name}:{number}")
    return found


def proofs():
    """{tag: [test function, …]}, read from @pytest.mark.equation decorators."""
    found = {}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.equation":
                    found.setdefault(mark.args[0].value, []).append(f"{path.name}::{node.name}")
    return found


def table():
    where, proved = tags(), proofs()
    lines = ["| equation | says | where | proved by |", "|---|---|---|---|"]
    for tag in MEANING:
        if tag in where:
            places = ", ".join(f"[{p}]({p.replace(':', '#L')})" for p in where[tag])
            tests = "<br>".join(t.split("::")[1].removeprefix("test_").replace("_", " ")
                                for t in proved.get(tag, []))
            lines.append(f"| {tag} | {MEANING[tag].replace('|', '¦')} | {places} | {tests} |")
    return "\n".join(lines)


def rewrite():
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split("<!-- equations -->")
    after = rest.split("<!-- end -->", 1)[1]
    readme.write_text(f"{before}<!-- equations -->\n{table()}\n<!-- end -->{after}")


if __name__ == "__main__":
    rewrite()
    print(table())
