"""The page: its sections one after the other, in one file that needs nothing else."""

from __future__ import annotations

from html import escape
from pathlib import Path

from titan.config import Config
from titan.dryrun.cluster import Cluster
from titan.dryrun.plan import JobPlan
from titan.explaining.facts import facts
from titan.explaining.job import job
from titan.explaining.memory import memory
from titan.explaining.mesh import mesh
from titan.explaining.parameters import parameters
from titan.explaining.pieces import Html, html, name, paragraph
from titan.explaining.style import SCRIPT, styles
from titan.explaining.time import time
from titan.explaining.traffic import traffic

TITLES = {
    "job": "The job",
    "mesh": "The mesh",
    "parameters": "Parameters",
    "memory": "Memory",
    "traffic": "Traffic",
    "time": "Time",
}
HOW_TO_READ = (
    "Behind a number stands what it is made of, with the figures filled in; of a number alone a pointer that rests on it shows "
    "it. What is underlined with dots was found by the dry run: the code of training took a step as each kind of rank, with "
    "tensors that have no memory, among ranks that are not there."
)


def page(config: Config, plan: JobPlan, cluster: Cluster) -> str:
    """A document. Raises ValueError where something cannot be built."""
    known = facts(config, plan)
    sections = [
        job(config, plan, cluster, known),
        mesh(config, plan, cluster),
        parameters(config, plan, known),
        memory(config, plan, cluster, known),
        traffic(plan, cluster, known),
        time(config, plan, cluster, known),
    ]
    title = f"{Path(config.source).name}: a plan explained"
    links = "".join(f'<a href="#{key}">{said}</a>' for key, said in TITLES.items())
    body = html(
        Html("<h1>"), name(title), Html("</h1>"), paragraph(HOW_TO_READ), Html(f"<nav aria-label='Sections'>{links}</nav>")
    )
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{styles()}</style></head>",
            f"<body><main>{body}",
            *sections,
            f"</main><script>{SCRIPT}</script></body></html>\n",
        ]
    )
