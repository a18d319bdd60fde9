"""Report of a search: verdict, page and plots."""
