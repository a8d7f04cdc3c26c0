"""Home Assistant's MQTT discovery: each camera is a device there. Pure."""

from __future__ import annotations

from typing import Any

from agent.watch.config import WatchConfig, identifier

EVENTS = ("answered", "failed", "busy", "began", "ended", "camera")


def device(config: WatchConfig, camera: str, model: str) -> tuple[str, dict[str, Any]]:
    """Topic and payload that announce one camera."""
    uid, at = f"attend_{identifier(config.node)}_{identifier(camera)}", config.at(camera)
    label = config.camera[camera].label or camera
    # a state has at most 255 characters; all of the answer is in the attributes
    shown = "{{ (value_json.answer or value_json.error or '') | string | truncate(250, true, '…') }}"
    parts: dict[str, dict[str, Any]] = {
        "answer": {
            "p": "sensor",
            "name": "Answer",
            "icon": "mdi:message-text",
            "state_topic": f"{at}/answer",
            "value_template": shown,
            "json_attributes_topic": f"{at}/answer",
        },
        "picture": {"p": "image", "name": "Picture", "image_topic": f"{at}/image", "content_type": "image/jpeg"},
        "event": {"p": "event", "name": "Event", "state_topic": f"{at}/event", "event_types": [*EVENTS]},
        "ask": {"p": "text", "name": "Ask", "command_topic": f"{at}/ask", "max": 255, "icon": "mdi:help"},
        "look": {"p": "button", "name": "Look now", "command_topic": f"{at}/look", "payload_press": "look", "icon": "mdi:eye"},
        "watching": {
            "p": "switch",
            "name": "Watching",
            "command_topic": f"{at}/watching/set",
            "state_topic": f"{at}/watching",
            "icon": "mdi:bell-ring",
        },
    }
    for name, part in parts.items():
        part |= {"unique_id": f"{uid}_{name}", "qos": 1}
    payload = {
        "dev": {"ids": [uid], "name": label, "mf": "attend", "mdl": model},
        "o": {"name": "attend"},
        "cmps": parts,
        "avty": [{"topic": f"{config.base}/status"}, {"topic": f"{at}/status"}],
        "avty_mode": "all",
    }
    return f"{config.discovery}/device/{uid}/config", payload
