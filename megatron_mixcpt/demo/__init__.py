"""The main job in miniature: teach a model facts that exist nowhere, by plain CPT and by Mix-CPT, and compare."""
