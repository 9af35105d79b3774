"""Plans, reports and memory as text, HTML and figures: functions from a value of ``core`` to what a person reads."""
