"""Whether weights fit the model they are connected to."""


def check_sla_weights(weights, facts, method):
    """Raises ValueError with one sentence where SLA weights and the model or the method do not fit."""
    if method != "automatic":
        raise ValueError(f"sla_weights are connected, and method is {method}: set it to automatic.")
    have, want = (len(weights.layers), weights.head_dim), (facts.num_layers, facts.head_dim)
    if have != want:
        raise ValueError(
            f"The SLA weights of {weights.source or 'this file'} have {have[0]} layers of head_dim {have[1]}, and this "
            f"model has {want[0]} of head_dim {want[1]}."
        )


def check_router(router, facts):
    """Raises ValueError with one sentence where the router was made for another model or token order."""
    router.require_model(
        model_family=facts.layout.family,
        num_layers=facts.num_layers,
        num_heads=facts.num_heads,
        head_dim=facts.head_dim,
    )
    if router.token_order != facts.layout.token_order:
        raise ValueError(
            f"The router was trained for token order {router.token_order!r}, and {facts.layout.family} models have "
            f"{facts.layout.token_order!r}."
        )
