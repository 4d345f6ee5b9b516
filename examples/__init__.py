"""Networks, plans and programs that show s2d-compiler at work."""
