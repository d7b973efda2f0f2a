"""A report as JSON, JUnit, Markdown and a page."""
