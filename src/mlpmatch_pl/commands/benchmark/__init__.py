"""How fast a training will be here, and what slows it down."""
