# SPDX-License-Identifier: Apache-2.0
"""The title, the description and the picture that a link to a page is shown with."""

from html import escape


def add_tags(app, page, template, context, document):
    title = context.get("title") or app.config.project
    tags = {"og:title": title, "og:description": app.config.html_short_title}
    if app.config.html_baseurl:  # Pictures need a full address.
        tags["og:image"] = f"{app.config.html_baseurl.rstrip('/')}/_static/card.png"
    context["metatags"] = context.get("metatags", "") + "".join(
        f'<meta property="{name}" content="{escape(value)}">\n'
        for name, value in tags.items()
    )


def setup(app):
    app.connect("html-page-context", add_tags)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
