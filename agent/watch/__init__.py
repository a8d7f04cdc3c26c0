"""Questions about cameras over MQTT."""
