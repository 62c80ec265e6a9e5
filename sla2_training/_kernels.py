"""The operator's names. Inside ComfyUI both packages are parts of the pack; alone they lie side by side on the path."""

# ruff: noqa: F401

if "." in __package__:
    from ..sla2_kernels.forced_blocks import forced_block_counts
    from ..sla2_kernels.kernel_failures import failure_in_a_line, kernel_failure_remedy
    from ..sla2_kernels.key_block_sums import key_block_sums, largest_scores, why_no_kernels
    from ..sla2_kernels.router import (
        K_BLOCK,
        MIN_LINEAR_WEIGHT,
        Q_BLOCK,
        block_count,
        mean_from_pools,
        own_key_blocks,
        pool_blocks,
        project,
        resample_ratio,
        selected_block_count,
    )
    from ..sla2_kernels.weights import RouterFileError, RouterLayer, RouterWeights, identity_router
else:
    from sla2_kernels.forced_blocks import forced_block_counts
    from sla2_kernels.kernel_failures import failure_in_a_line, kernel_failure_remedy
    from sla2_kernels.key_block_sums import key_block_sums, largest_scores, why_no_kernels
    from sla2_kernels.router import (
        K_BLOCK,
        MIN_LINEAR_WEIGHT,
        Q_BLOCK,
        block_count,
        mean_from_pools,
        own_key_blocks,
        pool_blocks,
        project,
        resample_ratio,
        selected_block_count,
    )
    from sla2_kernels.weights import RouterFileError, RouterLayer, RouterWeights, identity_router
