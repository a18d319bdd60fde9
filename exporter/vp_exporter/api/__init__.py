"""Public functions, exported by `vp_exporter`. Heavy packages are imported when a function is called."""
