#!/usr/bin/env python3
"""Finds dead links between the pages that rustdoc wrote: .ci/links.py DIRECTORY

A link is dead if its file or the place in the file is not there. Links to other hosts are not
followed; links to the pages of a dependency, which are not built here, are rustdoc's to check.
"""

import os
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit


# In texts of others that rustdoc repeats on our pages: of tracing (about a trait that every type has),
# of the standard library (about Arc and Box) and of vm-memory (about its trait of guest memory).
FOREIGN = ("dispatcher#setting-the-default-subscriber", "../../std/", "struct.VolatileSlice.html")


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.links, self.places = [], set()
        with open(path, encoding="utf-8") as file:
            text = file.read()
        # The page of a private module leads to the public one, and takes the place along.
        self.redirects = "location.replace(" in text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.places.add(value)
            elif tag == "a" and name == "href" and value and not value.startswith(FOREIGN):
                self.links.append(value)


def main():
    root = os.path.abspath(sys.argv[1])
    pages = {}
    for directory, _, files in os.walk(root):
        for file in files:
            # Pages of sources have a place for each line, which only a browser makes, and rustdoc's
            # help leads to an index of all crates, which it does not write.
            source = directory.startswith(os.path.join(root, "src"))
            if file.endswith(".html") and not source and file not in ("help.html", "settings.html"):
                path = os.path.join(directory, file)
                pages[path] = Page(path)
    dead, links = [], 0
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            links += 1
            file = os.path.normpath(os.path.join(os.path.dirname(path), unquote(url.path))) if url.path else path
            if os.path.isdir(file):
                file = os.path.join(file, "index.html")
            if not os.path.exists(file):
                dead.append((path, link))
            elif url.fragment and file in pages and not pages[file].redirects:
                if not {url.fragment, unquote(url.fragment)} & pages[file].places:
                    dead.append((path, link))
    for path, link in sorted(dead)[:50]:
        print(f"{os.path.relpath(path, root)}: {link}")
    print(f"{len(pages)} pages, {links} links, {len(dead)} dead")
    sys.exit(bool(dead))


main()
