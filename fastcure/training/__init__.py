"""The bundled script's parts: settings, schedules, the training loop, the run's folder and its picture."""
