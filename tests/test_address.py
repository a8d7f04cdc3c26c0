"""Addresses of cameras: no secret of one is ever shown, and what can never work is refused with what to do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.address import check_source, display, may_need_encoding, without_login
from streams.frames import MediaError


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtsp://10.0.0.2/live", "rtsp://10.0.0.2/live"),
        ("rtsp://me:secret@10.0.0.2/live", "rtsp://10.0.0.2/live"),
        ("rtsp://secret@cam.local:8554/live/1", "rtsp://cam.local:8554/live/1"),
        ("rtsp://me:se@cr@et@cam.local:554/live", "rtsp://cam.local:554/live"),
        ("rtsp://me:s%2Fe%40cret@cam.local/live", "rtsp://cam.local/live"),
        ("rtsp://me:secret@[fe80::1]:554/live", "rtsp://[fe80::1]:554/live"),
        ("rtsp://cam.local/live?usr=me&pwd=secret", "rtsp://cam.local/live"),
        ("http://192.168.1.5:8080/snap.jpg?usr=me&pwd=sec@ret", "http://192.168.1.5:8080/snap.jpg"),
        ("http://cam.local/snap.jpg?token=secret#secret", "http://cam.local/snap.jpg"),
        ("http://me:secret@192.168.1.5/snap.jpg?pwd=sec@ret", "http://192.168.1.5/snap.jpg"),
        ("http://me:secret@cam.local/snap.jpg?pwd=sec@ret", "http://…"),
        ("rtsp://cam.local/user=me&password=secret&channel=1", "rtsp://cam.local/…"),
        ("rtsp://me:sec/ret@cam.local/live", "rtsp://…"),
        ("rtsp://me:1/secret@cam.local/live", "rtsp://…"),
        ("rtsp://me:sec?ret@cam.local/live", "rtsp://…"),
        ("rtsp://me:sec#ret@cam.local/live", "rtsp://…"),
        ("rtsp://me:se@cr/e@t@cam.local/live", "rtsp://…"),
        ("rtsp://me:secret", "rtsp://…"),
        ("rtmp://me:secret@cam.local/live", "rtmp://cam.local/live"),
        ("me:secret@cam.local/live", "…@cam.local/live"),
        ("secret secret://x", "…"),
        ("videos/front@home.mp4", "videos/front@home.mp4"),
        (0, "camera 0"),
    ],
)
def test_of_an_address_only_scheme_host_port_and_path_are_shown(source: int | str, shown: str) -> None:
    assert display(source) == shown and "secret" not in shown


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(user=TEXT, password=TEXT, query=TEXT)
def test_whatever_a_login_is_made_of_it_is_not_shown(user: str, password: str, query: str) -> None:
    for source in (f"rtsp://{user}:{password}@cam.local:554/live", f"rtsp://{user}:{password}@cam.local:554/live?pwd={query}"):
        assert display(source) in ("rtsp://cam.local:554/live", "rtsp://…")
        try:
            check_source(source)
        except MediaError as error:
            assert re.sub(r"rtsp://(cam\.local:554/live|…)?|(?<=in )a user name.*", "", str(error)) in (
                "a camera's source is empty or holds control characters",
                "this  address names no host, or no port that can be; in ",
                "in this  address the user name or password cannot be told from host and path; in ",
                " holds characters that an address cannot hold; in ",
            )


@pytest.mark.parametrize(
    ("source", "why"),
    [
        (-1, "number is 0 or more"),
        ("", "is empty"),
        ("rtsp://cam\n.local", "control characters"),
        ("ftp://host/picture.jpg", "ftp://host/picture.jpg is no camera"),
        ("http:///picture.jpg", "names no host"),
        ("rtsp://me:sec/ret@cam.local/live", "names no host, or no port that can be; .*write @ as %40, / as %2F"),
        ("rtsp://me:1/2@cam.local/live", "cannot be told from host and path; .*write @ as %40, / as %2F"),
        ("rtsp://me:secret@cam.local:99999/live", "no port that can be"),
        ("http://me:secret@[::1/live", "names no host"),
        ("http://cam..local/a", "names no host"),
        ("http://cam.local/a?pwd=a#secret", "http://cam.local/a holds characters .* # as %23"),
        ("http://cam.local/sn p.jpg", "holds characters"),
        ("http://cam.local/ü", "holds characters"),
        ("me:secret@cam.local/live", "looks like an address without its scheme"),
        ("rtsp:me:secret@cam.local/live", "looks like an address without its scheme"),
    ],
)
def test_what_can_never_be_a_camera_is_refused_without_its_secrets(source: int | str, why: str) -> None:
    with pytest.raises(MediaError, match=why) as error:
        check_source(source)
    assert "secret" not in str(error.value) and "sec/" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        0,
        "/dev/video0",
        "front.mp4",
        "videos/front@home.mp4",
        "C:\\videos\\front.mp4",
        "rtsp://cam.local/live@hd",
        "rtsp://me:secret@cam.local:554/live@hd",
        "rtsp://me:p@ss@cam.local/live",
        "rtsp://me:pwd@[fe80::1%25eth0]/live",
        "RTSP://CAM/live",
        "http://192.168.1.5:8080/snap.jpg?usr=me&pwd=p@ss",
        "rtsp://küche.local/live",
    ],
)
def test_what_may_be_a_camera_is_taken(source: int | str) -> None:
    check_source(source)


@pytest.mark.parametrize(
    ("address", "needed"),
    [
        ("rtsp://cam/live?usr=me", False),
        ("rtsp://me:p%40ss-word_1!@cam/live", False),
        ("rtsp://me:p@ss@cam/live", True),
        ("rtsp://me:100%sure@cam/live", True),
        ("rtsp://cam/live?pwd=a#b", True),
        ("rtsp://me:a@cam/live?pwd=a@b", True),
    ],
)
def test_who_may_have_to_percent_encode_is_told(address: str, needed: bool) -> None:
    assert may_need_encoding(address) is needed


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("http://cam/a?b=c", (None, "cam", "http://cam/a?b=c")),
        ("http://me:p%40ss%2F@cam:81", (("me", "p@ss/"), "cam", "http://cam:81/")),
        ("http://me:p@ss@[::1]:81/a", (("me", "p@ss"), "::1", "http://[::1]:81/a")),
    ],
)
def test_a_login_is_taken_out_of_an_address_and_decoded(address: str, parts: object) -> None:
    assert without_login(address) == parts
