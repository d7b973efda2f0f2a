"""`mdm build`: a bundle's graphs become engines."""
