"""`mdm plugin`: what runs the operators on a GPU, made and tried."""
