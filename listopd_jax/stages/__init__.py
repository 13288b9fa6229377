"""What a run does, in order: prepare, SFT, calibrate, forecast, OPD, evaluation. The only room that knows Job."""
