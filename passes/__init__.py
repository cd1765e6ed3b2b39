"""Graph passes, one per module. `contract` defines their interface, `pipeline` combines some of them."""
