"""For the Python of a Home Assistant's own environment: discovery payloads on stdin, as `homeassistant` takes them. Prints the
platform and name of each part that its schemas accepted, and fails with their complaint, or where they dropped something."""

import json
import sys
from importlib import import_module
from importlib.util import find_spec

from homeassistant.components.mqtt import abbreviations

MQTT = "homeassistant.components.mqtt"

# Devices came with 2024.11, in which these two were new; 2024.3 is the last one for Python 3.11, and knows the parts alone.
LONG = {"cmps": "components", "p": "platform"} | abbreviations.ABBREVIATIONS


def spelt(given, names=LONG):
    return {names.get(key, key): value for key, value in given.items()}


taken = []
for payload in json.load(sys.stdin):
    device = spelt(payload)
    device["device"] = spelt(device["device"], abbreviations.DEVICE_ABBREVIATIONS)
    device["origin"] = spelt(device["origin"], abbreviations.ORIGIN_ABBREVIATIONS)
    device["components"] = {key: spelt(part) for key, part in device["components"].items()}
    if find_spec(f"{MQTT}.schemas"):
        import_module(f"{MQTT}.schemas").DEVICE_DISCOVERY_SCHEMA(device)
    shared = {key: value for key, value in device.items() if key != "components"}
    for part in device["components"].values():
        platform = part.pop("platform")
        kept = import_module(f"{MQTT}.{platform}").DISCOVERY_SCHEMA(shared | part)
        assert kept.keys() >= shared.keys() | part.keys(), (platform, part.keys() - kept.keys())
        taken.append([platform, part["name"]])
print(json.dumps(taken))
