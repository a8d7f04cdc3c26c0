"""The configuration of attend watch: what is wrong is named with its path, and the example is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import msgspec
import pytest

from agent.watch import config
from agent.watch.config import Config, ConfigError, Frigate, Schedule, Topic, escaped, read, wrong_schema
from streams.camera import PUSHED
from streams.mqtt import Broker, BrokerError

ONE = '[camera.front]\nsource = "a.mp4"\n'


def test_the_example_is_read_and_says_what_it_says() -> None:
    it = read(config.EXAMPLE)
    assert it.camera["front"].quick and it.camera["garage"].opened == PUSHED and it.camera["garage"].schema
    assert [type(trigger) for trigger in it.trigger] == [Frigate, Topic, Schedule]
    assert it.trigger[0].look_back_s == 3


def test_every_key_that_the_example_leaves_out_has_the_value_that_it_shows() -> None:
    """But for the broker's access, of which there is no default, and paths."""
    text, it = config.EXAMPLE.read_text(), read(config.EXAMPLE)
    shown = {"": it, "broker": it.broker, "camera.front": it.camera["front"], "trigger": it.trigger[0]}
    checked = 0
    for part in re.split(r"^(?=\[)", text, flags=re.M):
        where = re.match(r"\[+([\w.]*)", part)
        held = shown.pop(where[1] if where else "", None)
        for line in re.findall(r"^# (\w+ = .*)", part, re.M) if held is not None else ():
            [(key, value)] = tomllib.loads(line).items()
            checked += 1
            assert key in held.__struct_fields__, key
            if key not in ("user", "password_file", "tls", "ca", "client_id", "port", "frigate_camera", "severity", "budget"):
                assert value == getattr(held, key) or str(getattr(held, key)).startswith(str(value)), key
    assert checked > 15


def test_every_setting_is_in_the_example() -> None:
    text = config.EXAMPLE.read_text()
    for kind in (Config, Broker, config.Source, Frigate, Topic, Schedule):
        assert [name for name in kind.__struct_fields__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "missing required field `camera`"),
        ("[camera]\n", "$.camera"),
        (ONE + "[broker]\nport = 'x'\n", "Expected `int | null`, got `str` - at `$.broker.port`"),
        (ONE + "[broker]\nprot = 1\n", "unknown field `prot` - at `$.broker`"),
        (ONE + "budget = 71\n", "a budget is one of 70, 140, 280, 560, 1120 - at `$.camera.front.budget`"),
        (ONE + "look_back_s = 61\n", "<= 60.0 - at `$.camera[...].look_back_s`"),
        ("[camera.front]\n", "give either source or topic - at `$.camera.front`"),
        (ONE + '[camera."fr/ont"]\nsource="b"\n[camera.fr_ont]\nsource="b"\n', "would both be called fr_ont"),
        (ONE + '[[trigger]]\non = "frigate"\ncamera = "back"\n', "there is no camera back - at `$.trigger[0].camera`"),
        (ONE + '[[trigger]]\non = "nothing"\ncamera = "front"\n', "Invalid value 'nothing' - at `$.trigger[0].on`"),
        (ONE + '[[trigger]]\non = "schedule"\ncamera = "front"\n', "give either every_s or at - at `$.trigger[0]`"),
        (ONE + '[[trigger]]\non = "schedule"\ncamera = "front"\nat = ["25:00"]\n', "$.trigger[0].at[0]"),
        (ONE + '[camera.front.schema]\ntype = "nope"\n', "no JSON schema"),
        ("camera = [", "is not TOML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_path(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "attend.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(file)
    assert why in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value).split("TOML")[0]


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nothing.toml cannot be read: No such file"):
        read("nothing.toml")


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "attend.toml"
    file.write_text(ONE + '[broker]\nuser = "me"\n')
    it = read(file, {"front": "0", "back": "/dev/video2"}, "broker.local:1884")
    assert it.camera["front"].opened == 0 and it.camera["back"].opened == "/dev/video2"
    assert (it.broker.host, it.broker.port, it.broker.user) == ("broker.local", 1884, "me")
    assert read(None, {"front": "a.mp4"}, "broker").broker == Broker(host="broker")


@pytest.mark.parametrize("name", ["a/b", "a+b", "#", "\0", "", "Küche", "a b"])
def test_names_are_one_level_of_a_topic(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", escaped(name))


def test_passwords_come_from_files_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text("from file\n")
    monkeypatch.setenv("SECRET", "from environment")
    assert Broker().password() is None
    assert Broker(password_file=str(tmp_path / "secret")).password() == "from file"
    assert Broker(password_env="SECRET").password() == "from environment"
    for broker in (Broker(password_file="/nowhere"), Broker(password_env="NOWHERE")):
        with pytest.raises(BrokerError, match="cannot be read|is not set"):
            broker.password()


def test_schemas_that_would_fetch_something_or_never_end_are_refused() -> None:
    assert (
        wrong_schema({"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"type": "string"}}}) is None
    )
    for schema in (
        {"$ref": "http://x/y"},
        {"$dynamicRef": "http://x"},
        {"pattern": "(a+)+$"},
        {"type": "x"},
        {"title": "a" * 20_000},
    ):
        assert wrong_schema(schema), schema


def test_a_query_survives_being_written_down() -> None:
    from agent.watch.asked import Query

    it = Query(key="k", camera="c", question="q", asked=1.0, moment=2.0, until=3.0, schema={"type": "object"}, look_back_s=3)
    assert msgspec.json.decode(msgspec.json.encode(it), type=Query) == it
