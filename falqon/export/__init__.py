"""Trained models as directories that other tools load: train = serve."""

from falqon.export.model import FORMATS, export_model, format_report

__all__ = ["FORMATS", "export_model", "format_report"]
