"""Views that answer a click: every widget is one Python file with plain ES modules beside it."""

from influence_nb.widgets.audit import LabelAudit
from influence_nb.widgets.explorer import Explorer
from influence_nb.widgets.state import ExplorerState
from influence_nb.widgets.whatif import WhatIf

__all__ = ["Explorer", "ExplorerState", "LabelAudit", "WhatIf"]
