"""What the site needs besides Markdown: `ring.ipynb` as a page, without Jupyter."""

import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOK = Path(__file__).parent / "ring.ipynb"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the notebook's page."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    files.append(File.generated(config, "ring.md", content="\n\n".join(map(page_part, notebook["cells"]))))
    return files


def page_part(cell: dict[str, Any]) -> str:
    """Return a cell as Markdown: text, or code with what it printed and drew."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return source
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        if "text" in output:
            parts.append(f"```\n{''.join(output['text'])}```")
        else:
            parts.append(f"![what the cell draws](data:image/png;base64,{output['data']['image/png']})")
    return "\n\n".join(parts)
