"""The configuration of attend watch: what is wrong is named with its path, and the example is true."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from agent.watch import config
from agent.watch.config import (
    CameraConfig,
    ConfigError,
    FrigateTrigger,
    ScheduleTrigger,
    TopicTrigger,
    WatchConfig,
    identifier,
    read,
)
from streams.broker import BrokerConfig

FRONT = "[camera.front]\n"
ONE = FRONT + 'source = "a.mp4"\n'
BROKER = ONE + "[broker]\n"
TOPIC = ONE + '[[trigger]]\ncamera = "front"\non = "topic"\n'
SCHEDULE = ONE + '[[trigger]]\ncamera = "front"\non = "schedule"\n'
FRIGATE = ONE + '[[trigger]]\ncamera = "front"\non = "frigate"\n'


def test_the_example_is_read_and_says_what_it_says() -> None:
    it = read(config.EXAMPLE)
    assert it.camera["front"].quick and it.camera["garage"].source is None and it.camera["garage"].schema
    assert [type(trigger) for trigger in it.trigger] == [FrigateTrigger, TopicTrigger, ScheduleTrigger]
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
    for kind in (WatchConfig, BrokerConfig, CameraConfig, FrigateTrigger, TopicTrigger, ScheduleTrigger):
        assert [name for name in kind.__struct_fields__ if not re.search(rf"\b{name}\b", text)] == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "missing required field `camera`"),
        ("[camera]\n", "$.camera"),
        (BROKER + "port = 'x'\n", "Expected `int | null`, got `str` - at `$.broker.port`"),
        (BROKER + "prot = 1\n", "unknown field `prot` - at `$.broker`"),
        (ONE + "budget = 71\n", "a budget is one of 70, 140, 280, 560, 1120 - at `$.camera.front.budget`"),
        (ONE + "look_back_s = 61\n", "<= 60.0 - at `$.camera.front.look_back_s`"),
        ("[camera.front]\n", "give either source or topic - at `$.camera.front`"),
        (ONE + '[camera."fr/ont"]\nsource="b"\n[camera.fr_ont]\nsource="b"\n', "would both be called fr_ont"),
        (ONE + '[[trigger]]\non = "frigate"\ncamera = "back"\n', "there is no camera back - at `$.trigger[0].camera`"),
        (ONE + '[[trigger]]\non = "nothing"\ncamera = "front"\n', "Invalid value 'nothing' - at `$.trigger[0].on`"),
        (ONE + '[[trigger]]\non = "schedule"\ncamera = "front"\n', "give either every_s or at - at `$.trigger[0]`"),
        (ONE + '[[trigger]]\non = "schedule"\ncamera = "front"\nat = ["25:00"]\n', "$.trigger[0].at[0]"),
        (ONE + '[camera.front.schema]\ntype = "nope"\n', "no JSON schema"),
        ("camera = [", "is not TOML"),
        ("queue = " + "1" * 5_000, "is not TOML"),
        ("a = " + "[" * 5_000, "is not TOML"),
        (".".join("a" * 3_000) + " = 1\n", "nested too deeply"),
        (f'state = "~nobody-here/attend"\n{ONE}', "there is no home folder of this user - at `$.state`"),
        ("camera = 5\n", "got `int` - at `$.camera`"),
        ("camera.front = 5\n", "got `int` - at `$.camera.front`"),
        ("broker = 'me'\n" + ONE, "got `str` - at `$.broker`"),
        ('[camera.a]\nsource = "a.mp4"\n[camera.b]\nsource = "b.mp4"\nframes = 1\n', "at `$.camera.b.frames`"),
        (BROKER + 'host = "a b"\n', "or [IPv6 address]:port - at `$.broker.host`"),
        (BROKER + 'host = "mqtt://me:secret@host"\n', "holds no user and password: give user and password_file"),
        (BROKER + 'host = "ws://host"\n', "a broker's address is HOST[:PORT], mqtt://HOST[:PORT]"),
        (BROKER + 'host = "host:1884"\nport = 1883\n', "given twice, and differs - at `$.broker.host`"),
        (BROKER + "port = 65536\n", "<= 65535 - at `$.broker.port`"),
        (BROKER + 'password_env = "NOWHERE"\n', "a password is of no use without user - at `$.broker.user`"),
        (BROKER + 'user = "a"\npassword_env = "NOWHERE"\n', "is not set - at `$.broker.password_env`"),
        (BROKER + 'user = "a"\npassword_file = "/no"\n', "/no cannot be read: No such file or directory - at `$.brok"),
        (BROKER + 'user = "a"\npassword_file = "/no"\npassword_env = "A"\n', "give either password_file or password_env"),
        (BROKER + 'ca = "/no"\n', "is of no use without tls = true: all would go in the clear - at `$.broker.ca`"),
        (BROKER + 'tls = true\nca = "/no"\n', "/no cannot be read: No such file or directory - at `$.broker.ca`"),
        (BROKER + f'tls = true\nca = "{__file__}"\n', "at `$.broker.ca`"),
        (BROKER + 'user = "a\\u0000b"\n', "this text holds control characters - at `$.broker.user`"),
        (f'discovery = "home/#"\n{ONE}', "+ and # cannot be in it - at `$.discovery`"),
        (f'discovery = "homeassistant/"\n{ONE}', "neither begins nor ends with a slash - at `$.discovery`"),
        (f"deadline_s = inf\n{ONE}", "a number has to be finite - at `$.deadline_s`"),
        (ONE + "look_back_s = nan\n", "a number has to be finite - at `$.camera.front.look_back_s`"),
        (FRONT + "source = -1\n", "a camera's number is 0 or more - at `$.camera.front.source`"),
        (FRONT + 'source = ""\n', "is empty or holds control characters - at `$.camera.front.source`"),
        (FRONT + 'source = "rtmp://a"\n', "rtmp://a is no camera: give a device, a video file, or an rtsp:// or http://"),
        (FRONT + 'source = "rtsp://me:pass/secret@a"\n', "write @ as %40, / as %2F, ? as %3F, # as %23, : as %3A"),
        (FRONT + 'source = "http:///a"\n', "names no host, or no port that can be"),
        (FRONT + 'topic = "a/+/snapshot"\n', "so + and # cannot be in it - at `$.camera.front.topic`"),
        (FRONT + 'topic = "a/#"\n', "so + and # cannot be in it - at `$.camera.front.topic`"),
        (FRONT + 'topic = "agent/attend/front/image"\n', "on this topic attend itself publishes - at `$.camera.front.topic`"),
        (FRONT + 'topic = "a"\nschema = { a = 2020-01-01 }\n', "what JSON cannot hold - at `$.camera.front.schema`"),
        (TOPIC + 'topic = "home/doorbell_+"\n', "+ stands alone between slashes - at `$.trigger[0].topic`"),
        (TOPIC + 'topic = "a/#/b"\n', "# stands alone, as its last level - at `$.trigger[0].topic`"),
        (TOPIC + 'topic = ""\n', "at `$.trigger[0].topic`"),
        (FRIGATE + 'topic = "frigate/#"\n', "+ and # cannot be in it - at `$.trigger[0].topic`"),
        (FRIGATE + 'topic = "frigate/"\n', "ends with a slash - at `$.trigger[0].topic`"),
        (FRIGATE + 'of = "reviews"\nmin_score = 0.5\n', "reviews have no score; events have - at"),
        (SCHEDULE + "every_s = inf\n", "a number has to be finite - at `$.trigger[0].every_s`"),
        (FRIGATE + 'budget = 7\n', "a budget is one of 70, 140, 280, 560, 1120 - at `$.trigger[0].budget`"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_path(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "attend.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        read(file)
    told = str(error.value)
    assert why in told and str(file) in told and "\n" not in told.split("TOML")[0] and "secret" not in told


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nothing.toml cannot be read: No such file"):
        read("nothing.toml")


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "attend.toml"
    file.write_text(ONE + '[broker]\nuser = "me"\n')
    it = read(file, {"front": "0", "back": "/dev/video2"}, "broker.local:1884")
    assert it.camera["front"].source == 0 and it.camera["back"].source == "/dev/video2"
    assert (it.broker.host, it.broker.port, it.broker.user) == ("broker.local", 1884, "me")
    assert read(None, {"front": "a.mp4"}, "broker").broker == BrokerConfig(host="broker")


@pytest.mark.parametrize("name", ["a/b", "a+b", "#", "\0", "", "Küche", "a b"])
def test_names_are_one_level_of_a_topic(name: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]+", identifier(name))


@pytest.mark.parametrize(
    ("host", "broker"),
    [
        ("::1", BrokerConfig(host="::1")),
        ("[::1]:1884", BrokerConfig(host="::1", port=1884)),
        ("mqtt://broker.local", BrokerConfig(host="broker.local")),
        ("mqtts://broker.local:8884", BrokerConfig(host="broker.local", port=8884, tls=True)),
    ],
)
def test_a_brokers_address_is_taken_as_people_write_it(tmp_path: Path, host: str, broker: BrokerConfig) -> None:
    file = tmp_path / "attend.toml"
    file.write_text(f'{ONE}[broker]\nhost = "{host}"\n')
    assert read(file).broker == read(None, {"front": "a.mp4"}, host).broker == broker


@pytest.mark.parametrize(
    ("cameras", "broker", "why"),
    [
        ({"front": "rtsp://me:secret/x@a"}, None, "the command line: this rtsp:// address names no host"),
        ({"front": "²"}, "host:0", "a port is a number from 1 to 65535 - at `--broker`"),
        ({"front": "a.mp4"}, "me:secret@host", "holds no user and password"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_told_too(cameras: dict[str, str], broker: str | None, why: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(None, cameras, broker)
    assert why in str(error.value) and "secret" not in str(error.value)
