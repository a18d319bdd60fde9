"""The public functions, as `vp_exporter` offers them; nothing heavy is imported before one is called."""
