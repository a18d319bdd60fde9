"""vp_engines: open and run the bundles that vp-export writes."""
