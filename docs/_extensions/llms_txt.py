# SPDX-License-Identifier: Apache-2.0
"""The file llms.txt: one line for each page, with a link to the plain text of the page.

The format is that of https://llmstxt.org.
"""

from pathlib import Path

from docutils import nodes
from sphinx import addnodes


def first_sentence(document):
    for paragraph in document.findall(nodes.paragraph):
        text = " ".join(paragraph.astext().split())
        return text.split(". ")[0].rstrip(".:")
    return ""


def write_llms_txt(app, exception):
    if exception or app.builder.name != "html":
        return
    environment = app.env
    lines = ["# optax_rms", "", f"> {app.config.html_short_title}", ""]
    root = environment.get_doctree(environment.config.root_doc)
    for tree in root.findall(addnodes.toctree):
        lines += [f"## {tree['caption']}", ""]
        for _, page in tree["entries"]:
            document = environment.get_doctree(page)
            name = environment.titles[page].astext()
            source = Path(environment.doc2path(page)).suffix
            link = f"_sources/{page}{source}.txt"
            lines.append(f"- [{name}]({link}): {first_sentence(document)}")
        lines.append("")
    (Path(app.outdir) / "llms.txt").write_text("\n".join(lines))


def setup(app):
    app.connect("build-finished", write_llms_txt)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
