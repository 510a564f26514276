"""Families: one module each, with settings, batches and objective."""

from .base import Family, FamilyBatch, FamilySettings, Objective, RunContext, register_family

__all__ = ["Family", "FamilyBatch", "FamilySettings", "Objective", "RunContext", "register_family"]
