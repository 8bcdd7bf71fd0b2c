"""Entry point of the group `lmms_eval.models`: makes `lmms-eval --model dpaudit` work.

Apart from reports.lmms because lmms-eval loads this while it is still importing itself.
"""

from typing import Any


def manifests() -> list[Any]:
    """The manifest of dpaudit's model, as lmms_eval.models.registry_v2.ModelManifest."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="dpaudit", simple_class_path="reports.lmms.DpauditModel")]
