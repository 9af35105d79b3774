"""Data, plans, reports and memory as text, HTML and figures: from a value of ``core`` to what a person reads."""

from __future__ import annotations

from nbqlora.core import display
from nbqlora.core.plan import Plan
from nbqlora.core.report import Comparison, Report
from nbqlora.view import html, text
from nbqlora.view.data import register_data_views
from nbqlora.view.doctor import register_doctor_view
from nbqlora.view.holders import register_holder_views
from nbqlora.view.memory import register_memory_views
from nbqlora.view.memory_table import register_memory_table_view
from nbqlora.view.merged import register_merge_view


def register_all() -> None:
    """Let every value of ``core`` show itself through this layer."""
    register_memory_views()
    register_memory_table_view()
    register_holder_views()
    register_data_views()
    register_doctor_view()
    register_merge_view()
    display.register(Plan, text=text.plan_text, html=html.plan_html)
    display.register(Report, text=text.report_text, html=html.report_html)
    display.register(Comparison, text=text.comparison_text, html=html.comparison_html)
