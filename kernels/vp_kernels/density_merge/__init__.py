"""vp::density_merge, the step of BAT: merge similar attentive tokens and cluster the inattentive ones."""
