"""The gallery: a world of real pictures, with hundreds of objects; what a claim about many concepts is tried on."""
