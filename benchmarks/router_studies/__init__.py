"""Experiments on captured Q, K and V that the training's defaults rest on (docs/ROUTER_DECISIONS.md).

Every figure is the hard top-k output error against dense attention on held-out captures. benchmarks/explore_router.py runs them.
"""
