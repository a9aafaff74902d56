"""What the guards share; no file here is a guard."""
