"""vp::match_merge: bipartite soft matching of tokens, and the merge of the most similar pairs."""
