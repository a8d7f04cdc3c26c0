"""Questions about cameras, over MQTT. README.md says what is where."""
