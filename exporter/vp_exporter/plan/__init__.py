"""Reduction plans, conversion from and to masks, and the multiply-accumulates of a model under a plan."""

from vp_exporter.plan.plan import BlockTokens, PlanModel, ReductionPlan

__all__ = ["BlockTokens", "PlanModel", "ReductionPlan"]
