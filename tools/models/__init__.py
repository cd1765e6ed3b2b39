"""Models by name: from a hub, a folder, or the demo's."""
