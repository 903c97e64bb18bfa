"""Thin bridges to other libraries; importing one imports that library."""
