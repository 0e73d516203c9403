"""What is measured of models: attention, gradients, synergy between the tasks, studies over methods and sizes."""
