"""lmms-eval: students and teachers as its model `linmu`, which it finds by an entry point."""


def manifest():
    """Returns what lmms-eval has to know of the model, without importing it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("linmu", chat_class_path="linmu_hf.evaluation.lmms.model.LinMU")
