"""Reduction plans: what leaves a model where, masks as plans, and the multiply-accumulates of a model under a plan."""

from vp_exporter.plan.plan import BlockTokens, PlanModel, ReductionPlan

__all__ = ["BlockTokens", "PlanModel", "ReductionPlan"]
